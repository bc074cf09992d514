/* Attention of few rows per request to paged keys: each row is computed by itself, so its result is the same bit for
 * bit whatever else is in the batch, and no request is padded to another's size.
 *
 * Scores, sums and keys are fp32. A score is the sum of 16 partial sums, added in one order; the weights are summed in
 * LANES partial sums by place among the keys that the row sees, and the values place by place: a node of a tree has the
 * bits that its token has without the tree.
 */
#include <math.h>
#include <stdlib.h>

#include "numbers.h"

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

#define WIDTH 16
/* Rows that read a key together, and the widest head, in vectors. */
#define MAX_ROWS 4
#define MAX_VECTORS 16

typedef float Vector __attribute__((vector_size(4 * WIDTH)));

enum { TREE, CHAIN, BIDIRECTIONAL };
enum { NO_MEMORY = 1, NO_PAGE = 2 };

/* One request, as the caller lists them. */
typedef struct {
    int64_t first_row, num_rows, num_context, kind;
} Request;

typedef struct {
    const void *q;
    int64_t stride;
    const float *k_pages, *v_pages; /* [num_pages, page_size, num_kv_heads, head_dim] */
    const Request *requests;
    const int64_t *first_task; /* [num_requests + 1] */
    const int32_t *page_table; /* [num_requests, table_width] */
    const uint32_t *ancestors; /* [num_all_rows, num_words] */
    void *out;
    int64_t num_requests, table_width, num_pages, page_size, num_words;
    int64_t num_heads, num_kv_heads, num_vectors, rows_per_task;
    float scale;
    int half;
} Attention;

/* Rows of one request that share a head of K and V: of each query row, the heads that do. */
typedef struct {
    const Request *request;
    const int32_t *pages;
    int64_t kv_head, num_keys;
    int64_t row[MAX_ROWS], head[MAX_ROWS];
} Task;

INLINE Vector vector_of(const float *x) {
    Vector v;
    memcpy(&v, x, sizeof v);
    return v;
}

INLINE Vector multiply_add_vector(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
    return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    union {
        Vector whole;
        __m256 part[2];
    } x = {a}, y = {b}, z = {c};
    for (int i = 0; i < 2; i++) z.part[i] = _mm256_fmadd_ps(x.part[i], y.part[i], z.part[i]);
    return z.whole;
#else
    return a * b + c;
#endif
}

INLINE float sum_of(Vector x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    for (int width = WIDTH / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; lane++) x[lane] += x[lane + width];
    return x[0];
#endif
}

/* The first position behind `from` that is on another page, or the end. */
INLINE int64_t run_end(const Attention *a, int64_t from, int64_t end) {
    int64_t next = (from / a->page_size + 1) * a->page_size;
    return next < end ? next : end;
}

INLINE const float *slot_of(const Attention *a, const Task *task, const float *pages, int64_t position) {
    int64_t slot = task->pages[position / a->page_size] * a->page_size + position % a->page_size;
    return pages + (slot * a->num_kv_heads + task->kv_head) * a->num_vectors * WIDTH;
}

/* Whether a row sees the key at a position behind the context. */
INLINE int sees(const Attention *a, const Task *task, int64_t row, int64_t own) {
    switch (task->request->kind) {
        case CHAIN: return own <= row;
        case BIDIRECTIONAL: return 1;
        default: return a->ancestors[(task->request->first_row + row) * a->num_words + own / 32] >> (own % 32) & 1;
    }
}

/* Weights of one row's keys from their scores, in place, without the division by their sum, which is returned. */
ROW_FUNCTION float weigh(float *scores, int64_t num_keys) {
    float most = -INFINITY, sums[LANES] = {0};
    for (int64_t i = 0; i < num_keys; i++) most = scores[i] > most ? scores[i] : most;
    int64_t i = 0;
    for (; i + LANES <= num_keys; i += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            float score = scores[i + lane], weight = exponential(score - most);
            scores[i + lane] = score == -INFINITY ? 0.0f : weight;
            sums[lane] += scores[i + lane];
        }
    for (int lane = 0; i + lane < num_keys; lane++) {
        float score = scores[i + lane], weight = exponential(score - most);
        scores[i + lane] = score == -INFINITY ? 0.0f : weight;
        sums[lane] += scores[i + lane];
    }
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; lane++) sums[lane] += sums[lane + width];
    return sums[0];
}

/* The same of the keys that a row sees; 0 for the others. Those that it sees are summed as if no others were between
 * them, so a node of a tree has the bits of the same token at the end of a sequence. */
INLINE float weigh_seen(const Attention *a, const Task *task, int64_t row, float *scores) {
    int64_t first = task->request->num_context, num_seen = first;
    for (int64_t i = first; i < task->num_keys; i++)
        if (sees(a, task, row, i - first)) scores[num_seen++] = scores[i];
    float sum = weigh(scores, num_seen);
    for (int64_t i = task->num_keys - 1; i >= first; i--)
        scores[i] = sees(a, task, row, i - first) ? scores[--num_seen] : 0.0f;
    return sum;
}

INLINE void attend_of(const Attention *a, const Task *task, float *scores, int num_rows, int num_vectors) {
    int64_t num_keys = task->num_keys, num_context = task->request->num_context;
    int64_t head_dim = (int64_t)num_vectors * WIDTH, key_stride = a->num_kv_heads * head_dim;
    Vector q[MAX_ROWS][MAX_VECTORS], sums[MAX_ROWS][MAX_VECTORS];
    for (int r = 0; r < num_rows; r++) {
        float row[MAX_VECTORS * WIDTH];
        int64_t place = (task->request->first_row + task->row[r]) * a->stride + task->head[r] * head_dim;
        const void *from = at(a->q, place, a->half);
        for (int64_t i = 0; i < head_dim; i++) row[i] = load(from, i, a->half);
        for (int v = 0; v < num_vectors; v++) {
            q[r][v] = vector_of(row + v * WIDTH);
            sums[r][v] = (Vector){0};
        }
    }
    for (int64_t from = 0, to; from < num_keys; from = to) {
        to = run_end(a, from, num_keys);
        const float *key = slot_of(a, task, a->k_pages, from);
        for (int64_t i = from; i < to; i++, key += key_stride)
            for (int r = 0; r < num_rows; r++) {
                Vector product = q[r][0] * vector_of(key);
                for (int v = 1; v < num_vectors; v++)
                    product = multiply_add_vector(q[r][v], vector_of(key + v * WIDTH), product);
                scores[r * num_keys + i] = sum_of(product) * a->scale;
            }
    }
    float scales[MAX_ROWS];
    for (int r = 0; r < num_rows; r++) {
        scales[r] = 1.0f / weigh_seen(a, task, task->row[r], scores + r * num_keys);
    }
    for (int64_t from = 0, to; from < num_keys; from = to) {
        to = run_end(a, from, num_keys);
        const float *value = slot_of(a, task, a->v_pages, from);
        for (int64_t i = from; i < to; i++, value += key_stride)
            for (int r = 0; r < num_rows; r++) {
                float weight = scores[r * num_keys + i];
                /* A value that is not seen may be anything. */
                if (i >= num_context && weight == 0.0f) continue;
                Vector weights = (Vector){0} + weight;
                for (int v = 0; v < num_vectors; v++)
                    sums[r][v] = multiply_add_vector(weights, vector_of(value + v * WIDTH), sums[r][v]);
            }
    }
    for (int r = 0; r < num_rows; r++) {
        int64_t place = ((task->request->first_row + task->row[r]) * a->num_heads + task->head[r]) * head_dim;
        for (int v = 0; v < num_vectors; v++)
            for (int lane = 0; lane < WIDTH; lane++)
                store(a->out, place + v * WIDTH + lane, sums[r][v][lane] * scales[r], a->half);
    }
}

/* The usual heads as constants, so that a tile's rows stay in registers. */
ROW_FUNCTION void attend_4x64(const Attention *a, const Task *t, float *scores) { attend_of(a, t, scores, 4, 4); }
ROW_FUNCTION void attend_2x128(const Attention *a, const Task *t, float *scores) { attend_of(a, t, scores, 2, 8); }
ROW_FUNCTION void attend_1x64(const Attention *a, const Task *t, float *scores) { attend_of(a, t, scores, 1, 4); }
ROW_FUNCTION void attend_1x128(const Attention *a, const Task *t, float *scores) { attend_of(a, t, scores, 1, 8); }
ROW_FUNCTION void attend_any(const Attention *a, const Task *task, float *scores, int num_rows) {
    attend_of(a, task, scores, num_rows, (int)a->num_vectors);
}

/* Returns NO_MEMORY, NO_PAGE where the table names a page that there is not, or 0. */
static int run_task(const Attention *a, int64_t index) {
    int64_t low = 0, high = a->num_requests;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (a->first_task[middle] <= index)
            low = middle;
        else
            high = middle;
    }
    const Request *request = &a->requests[low];
    int64_t per_key = a->num_heads / a->num_kv_heads, num_all = request->num_rows * per_key;
    int64_t tasks_per_head = (num_all + a->rows_per_task - 1) / a->rows_per_task, own = index - a->first_task[low];
    int64_t first = own % tasks_per_head * a->rows_per_task;
    int num_rows = (int)(num_all - first < a->rows_per_task ? num_all - first : a->rows_per_task);
    Task task = {.request = request, .pages = a->page_table + low * a->table_width, .kv_head = own / tasks_per_head};
    for (int r = 0; r < num_rows; r++) {
        task.row[r] = (first + r) / per_key;
        task.head[r] = task.kv_head * per_key + (first + r) % per_key;
    }
    task.num_keys = request->num_context + (request->kind == CHAIN ? task.row[num_rows - 1] + 1 : request->num_rows);
    for (int64_t page = 0; page * a->page_size < task.num_keys; page++)
        if (task.pages[page] < 0 || task.pages[page] >= a->num_pages) return NO_PAGE;
    float *scores = malloc((size_t)(num_rows * task.num_keys) * sizeof(float));
    if (!scores) return NO_MEMORY;
    if (a->num_vectors == 4 && num_rows == 4)
        attend_4x64(a, &task, scores);
    else if (a->num_vectors == 4 && num_rows == 1)
        attend_1x64(a, &task, scores);
    else if (a->num_vectors == 8 && num_rows == 2)
        attend_2x128(a, &task, scores);
    else if (a->num_vectors == 8 && num_rows == 1)
        attend_1x128(a, &task, scores);
    else
        attend_any(a, &task, scores, num_rows);
    free(scores);
    return 0;
}

/* q [num_all_rows, num_heads, head_dim] with `stride` elements from row to row, bf16 where `half` is set; out likewise,
 * contiguous. `requests`, `first_task` and the rest are as in `Attention`; `rows_per_task` is at most MAX_ROWS. Returns
 * 0, or NO_MEMORY and NO_PAGE together where a task met them. */
int tree_attention(const void *q, int64_t stride, const float *k_pages, const float *v_pages, const Request *requests,
                   const int64_t *first_task, const int32_t *page_table, const uint32_t *ancestors, void *out,
                   int64_t num_requests, int64_t table_width, int64_t num_pages, int64_t page_size, int64_t num_words,
                   int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t rows_per_task, float scale,
                   int half, int threads) {
    Attention a = {.q = q,
                   .stride = stride,
                   .k_pages = k_pages,
                   .v_pages = v_pages,
                   .requests = requests,
                   .first_task = first_task,
                   .page_table = page_table,
                   .ancestors = ancestors,
                   .out = out,
                   .num_requests = num_requests,
                   .table_width = table_width,
                   .num_pages = num_pages,
                   .page_size = page_size,
                   .num_words = num_words,
                   .num_heads = num_heads,
                   .num_kv_heads = num_kv_heads,
                   .num_vectors = head_dim / WIDTH,
                   .rows_per_task = rows_per_task,
                   .scale = scale,
                   .half = half};
    int64_t num_tasks = first_task[num_requests];
    int failed = 0;
    if (threads > 1) {
        _Pragma("omp parallel for schedule(dynamic) num_threads(threads) reduction(|:failed)")
        for (int64_t i = 0; i < num_tasks; i++) failed |= run_task(&a, i);
    } else {
        for (int64_t i = 0; i < num_tasks; i++) failed |= run_task(&a, i);
    }
    return failed;
}
