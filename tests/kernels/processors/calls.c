/* Makes recorded calls of the CPU kernels on this processor and writes what they answer (support/recorded_calls.py).
 *
 * Every buffer ends where memory that may not be touched begins, so a kernel that reads or writes past one is killed.
 * SPARE bytes lie between for an emulator that reads too much itself: the scalar vfmadd of QEMU 7.2 reads 16 bytes.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MAX_ARGUMENTS 24
#define NAME_BYTES 24

enum { INTEGER, FLOAT, INPUT, OUTPUT, NONE, TABLES };

typedef struct {
    int64_t kind, size, integer;
    double number;
    char *buffer, *mapping;
    size_t mapping_size;
} Argument;

void rms_norm(const void *, int64_t, const void *, void *, int64_t, int64_t, float, int, int);
void silu_mul(const void *, int64_t, void *, int64_t, int64_t, int, int);
int qk_norm_rope_store(const void *, int64_t, const void *, const void *, const void *, const int64_t *, void *, void *,
                       void *, int64_t, int64_t, int64_t, int64_t, int64_t, float, int, int, int);
int tree_attention(const void *, int64_t, const float *, const float *, const void *, const int64_t *, const int32_t *,
                   const uint32_t *, void *, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                   int64_t, float, int, int);
int grow_trees(const void *, int64_t, int64_t, const int64_t *, int64_t, const int64_t *, int64_t, int64_t *, int64_t,
               int64_t *);
int draft_candidates(const void *, int64_t, int64_t, int, int64_t, int64_t, int64_t, int64_t, float, const void *,
                     const void *, int64_t, int, int64_t *, float *, int32_t *, int);
void map_scores(const int32_t *, int64_t, int64_t, const int32_t *, int64_t, int64_t, int64_t, int64_t, int32_t *);

static size_t spare;

static void fail(const char *what) {
    fprintf(stderr, "%s\n", what);
    exit(1);
}

static void read_all(void *to, size_t size, FILE *file) {
    if (size && fread(to, size, 1, file) != 1) fail("the calls end too early");
}

static void read_buffer(Argument *a, FILE *file) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), used = ((size_t)a->size + spare + page - 1) / page * page;
    a->mapping_size = used + page;
    a->mapping = mmap(0, a->mapping_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (a->mapping == MAP_FAILED || mprotect(a->mapping + used, page, PROT_NONE)) fail("no memory");
    a->buffer = a->mapping + used - spare - a->size;
    read_all(a->buffer, (size_t)a->size, file);
}

static void read_argument(Argument *a, FILE *file) {
    memset(a, 0, sizeof *a);
    read_all(&a->kind, sizeof a->kind, file);
    read_all(&a->size, sizeof a->size, file);
    if (a->kind == INTEGER)
        read_all(&a->integer, sizeof a->integer, file);
    else if (a->kind == FLOAT)
        read_all(&a->number, sizeof a->number, file);
    else if (a->kind != NONE)
        read_buffer(a, file);
}

/* Tables of grow_trees lie before what they point at; in the file a pointer is its distance from the first of them. */
static void place_tables(Argument *a, int64_t num) {
    int64_t *fields = (int64_t *)a->buffer;
    for (int64_t i = 0; i < num; i++)
        for (int k = 0; k < 2; k++)
            if (fields[8 * i + k]) fields[8 * i + k] += (int64_t)(intptr_t)a->buffer;
}

#define P(i) ((void *)a[i].buffer)
#define I(i) (a[i].integer)
#define N(i) ((int)a[i].integer)
#define F(i) ((float)a[i].number)

static int64_t call(const char *name, Argument *a) {
    if (!strcmp(name, "rms_norm")) {
        rms_norm(P(0), I(1), P(2), P(3), I(4), I(5), F(6), N(7), N(8));
    } else if (!strcmp(name, "silu_mul")) {
        silu_mul(P(0), I(1), P(2), I(3), I(4), N(5), N(6));
    } else if (!strcmp(name, "qk_norm_rope_store")) {
        return qk_norm_rope_store(P(0), I(1), P(2), P(3), P(4), P(5), P(6), P(7), P(8), I(9), I(10), I(11), I(12),
                                  I(13), F(14), N(15), N(16), N(17));
    } else if (!strcmp(name, "tree_attention")) {
        return tree_attention(P(0), I(1), P(2), P(3), P(4), P(5), P(6), P(7), P(8), I(9), I(10), I(11), I(12), I(13),
                              I(14), I(15), I(16), I(17), F(18), N(19), N(20));
    } else if (!strcmp(name, "grow_trees")) {
        place_tables(&a[0], I(1));
        return grow_trees(P(0), I(1), I(2), P(3), I(4), P(5), I(6), P(7), I(8), P(9));
    } else if (!strcmp(name, "draft_candidates")) {
        return draft_candidates(P(0), I(1), I(2), N(3), I(4), I(5), I(6), I(7), F(8), P(9), P(10), I(11), N(12), P(13),
                                P(14), P(15), N(16));
    } else if (!strcmp(name, "map_scores")) {
        map_scores(P(0), I(1), I(2), P(3), I(4), I(5), I(6), I(7), P(8));
    } else {
        fail("no such function");
    }
    return 0;
}

int main(int argc, char **argv) {
    FILE *calls = argc == 4 ? fopen(argv[1], "rb") : 0, *answers = calls ? fopen(argv[2], "wb") : 0;
    if (!answers) fail("usage: calls CALLS ANSWERS SPARE");
    spare = strtoul(argv[3], 0, 10);
    int64_t num_calls, num_arguments;
    read_all(&num_calls, sizeof num_calls, calls);
    for (int64_t i = 0; i < num_calls; i++) {
        char name[NAME_BYTES];
        Argument a[MAX_ARGUMENTS];
        read_all(name, sizeof name, calls);
        read_all(&num_arguments, sizeof num_arguments, calls);
        if (num_arguments > MAX_ARGUMENTS) fail("too many arguments");
        for (int64_t k = 0; k < num_arguments; k++) read_argument(&a[k], calls);
        int64_t returned = call(name, a);
        fwrite(&returned, sizeof returned, 1, answers);
        for (int64_t k = 0; k < num_arguments; k++) {
            if (a[k].kind == OUTPUT) fwrite(a[k].buffer, 1, (size_t)a[k].size, answers);
            if (a[k].mapping) munmap(a[k].mapping, a[k].mapping_size);
        }
    }
    if (fclose(answers)) fail("the answers cannot be written");
    return 0;
}
