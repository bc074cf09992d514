/* From a draft head's logits to the candidates of greedy requests and their scores.
 *
 * As in jetflow_cluster.tree.coupled, whose formulas these are. Each depth of each request is a row of its own, and has
 * one order of operations.
 */
#include <math.h>

#include "numbers.h"

/* Scores per nat, and the worst one. */
#define SCORE_UNIT 65536.0f
#define WORST_SCORE (-16777216.0f)
/* Floor of the mass outside of the candidates, which rounding can push below zero. */
#define LEAST_REST 1e-12
#define MAX_WIDTH 64
/* Logits are searched in blocks; few of these can hold a candidate. */
#define BLOCK 64
#define MAX_BLOCKS 4096

typedef struct {
    const void *logits;
    int64_t request_stride, depth_stride, num_depths, vocab_size, width;
    float sharpness;
    const void *parent, *child; /* [vocab_size, rank] each, or NULL */
    int64_t rank;
    int64_t *ids;    /* [num_requests, num_depths, width] */
    float *logprobs; /* the same */
    int32_t *scores; /* [num_requests, num_depths, num_parents, width] */
    int64_t num_parents;
} Draft;

/* The greatest of x[from .. to], what is not a number left out; infinitely little where nothing is left. */
INLINE float greatest(const void *x, int64_t from, int64_t to, int half) {
    float most[LANES];
    for (int lane = 0; lane < LANES; lane++) most[lane] = -INFINITY;
    int64_t i = from;
    for (; i + LANES <= to; i += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            float value = load(x, i + lane, half);
            most[lane] = value > most[lane] ? value : most[lane];
        }
    for (int lane = 0; i + lane < to; lane++) {
        float value = load(x, i + lane, half);
        most[lane] = value > most[lane] ? value : most[lane];
    }
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; lane++)
            most[lane] = most[lane + width] > most[lane] ? most[lane + width] : most[lane];
    return most[0];
}

/* Puts a value among the best, which fall; behind equals. */
INLINE int64_t insert(float *values, int64_t *ids, int64_t num, int64_t width, float value, int64_t id) {
    int64_t place = num < width ? num : width - 1;
    for (; place > 0 && values[place - 1] < value; place--) {
        values[place] = values[place - 1];
        ids[place] = ids[place - 1];
    }
    values[place] = value;
    ids[place] = id;
    return num < width ? num + 1 : width;
}

/* The `width` greatest logits of a row, of equals the lower ids first; what is not a number comes last. */
INLINE void find_best(const void *x, int64_t n, int64_t width, float *values, int64_t *ids, int half) {
    float blocks[MAX_BLOCKS], tops[MAX_WIDTH];
    int64_t top_ids[MAX_WIDTH], num_tops = 0;
    int64_t size = BLOCK * ((n + BLOCK * MAX_BLOCKS - 1) / (BLOCK * MAX_BLOCKS)), num_blocks = (n + size - 1) / size;
    for (int64_t b = 0; b < num_blocks; b++) {
        blocks[b] = greatest(x, b * size, (b + 1) * size < n ? (b + 1) * size : n, half);
        if (num_tops < width || blocks[b] > tops[width - 1])
            num_tops = insert(tops, top_ids, num_tops, width, blocks[b], b);
    }
    /* So many logits at least are this great. */
    float least = num_tops == width ? tops[width - 1] : -INFINITY;
    int64_t num = 0;
    for (int64_t b = 0; b < num_blocks; b++) {
        if (blocks[b] < least) continue;
        int64_t end = (b + 1) * size < n ? (b + 1) * size : n;
        for (int64_t i = b * size; i < end; i++) {
            float value = load(x, i, half);
            if (value >= least && (num < width || value > values[width - 1])) {
                num = insert(values, ids, num, width, value, i);
                if (num == width) least = values[width - 1];
            }
        }
    }
    for (int64_t i = 0; num < width; i++) {
        int is_new = 1;
        for (int64_t k = 0; k < num; k++) is_new &= ids[k] != i;
        if (is_new) {
            values[num] = -INFINITY;
            ids[num++] = i;
        }
    }
}

/* Sum of e^(factor * (x - most)). */
INLINE float mass_of(const void *x, int64_t n, float most, float factor, int half) {
    float sums[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int lane = 0; lane < LANES; lane++)
            sums[lane] += exponential(factor * (load(x, i + lane, half) - most));
    for (int lane = 0; i + lane < n; lane++) sums[lane] += exponential(factor * (load(x, i + lane, half) - most));
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; lane++) sums[lane] += sums[lane + width];
    return sums[0];
}

INLINE int32_t fixed_point(float nats) {
    float score = nats * SCORE_UNIT;
    score = score < 0.0f ? score : score >= 0.0f ? 0.0f : WORST_SCORE; /* the last is what is not a number */
    return (int32_t)__builtin_rintf(score > WORST_SCORE ? score : WORST_SCORE);
}

INLINE void marginal_row_of(const Draft *a, int64_t row, int half) {
    int64_t request = row / a->num_depths, depth = row % a->num_depths, width = a->width;
    const void *x = at(a->logits, request * a->request_stride + depth * a->depth_stride, half);
    float values[MAX_WIDTH], factor = depth > 0 ? a->sharpness : 1.0f;
    find_best(x, a->vocab_size, width, values, a->ids + row * width, half);
    float mass = logf(mass_of(x, a->vocab_size, values[0], factor, half));
    for (int64_t i = 0; i < width; i++) a->logprobs[row * width + i] = factor * (values[i] - values[0]) - mass;
}

ROW_FUNCTION void marginal_row(const Draft *a, int64_t row, int half) {
    if (half)
        marginal_row_of(a, row, 1);
    else
        marginal_row_of(a, row, 0);
}

/* Scores of a depth under each candidate above it. */
INLINE void corrected_row_of(const Draft *a, int64_t row, int half) {
    int64_t width = a->width, rank = a->rank;
    const int64_t *ids = a->ids + row * width, *above = ids - width;
    const float *logprobs = a->logprobs + row * width;
    double guessed = 0.0;
    for (int64_t i = 0; i < width; i++) guessed += exp(logprobs[i]);
    float rest = (float)log(1.0 - guessed > LEAST_REST ? 1.0 - guessed : LEAST_REST);
    for (int64_t p = 0; p < width; p++) {
        int32_t *scores = a->scores + (row * width + p) * width;
        const void *parent = at(a->parent, above[p] * rank, half);
        float logits[MAX_WIDTH], most = rest, mass = 0.0f;
        for (int64_t i = 0; i < width; i++) {
            const void *child = at(a->child, ids[i] * rank, half);
            float sums[LANES] = {0};
            int64_t k = 0;
            for (; k + LANES <= rank; k += LANES)
                for (int lane = 0; lane < LANES; lane++)
                    sums[lane] = multiply_add(load(parent, k + lane, half), load(child, k + lane, half), sums[lane]);
            for (int lane = 0; k + lane < rank; lane++)
                sums[lane] = multiply_add(load(parent, k + lane, half), load(child, k + lane, half), sums[lane]);
            for (int part = LANES / 2; part > 0; part /= 2)
                for (int lane = 0; lane < part; lane++) sums[lane] += sums[lane + part];
            logits[i] = logprobs[i] + sums[0];
            most = logits[i] > most ? logits[i] : most;
        }
        for (int64_t i = 0; i < width; i++) mass += exponential(logits[i] - most);
        mass = most + logf(mass + exponential(rest - most));
        for (int64_t i = 0; i < width; i++) scores[i] = fixed_point(logits[i] - mass);
    }
}

ROW_FUNCTION void scored_row(const Draft *a, int64_t row, int half) {
    int64_t width = a->width;
    if (a->parent && row % a->num_depths) {
        if (half)
            corrected_row_of(a, row, 1);
        else
            corrected_row_of(a, row, 0);
        return;
    }
    int32_t *scores = a->scores + row * a->num_parents * width;
    for (int64_t p = 0; p < a->num_parents; p++)
        for (int64_t i = 0; i < width; i++) scores[p * width + i] = fixed_point(a->logprobs[row * width + i]);
}

/* Candidates of each depth, best first, and their scores.
 *
 * logits [num_requests, num_depths, vocab_size] with strides in elements, bf16 where `half` is set; depths behind the
 * first are multiplied by `sharpness`. parent and child [vocab_size, rank], bf16 where `half_factors` is set, or NULL.
 * ids [num_requests, num_depths, width], logprobs likewise, scores [num_requests, num_depths, num_parents, width] with
 * num_parents = width where there are factors, else 1. Returns 1, with nothing written, for a width without room. */
int draft_candidates(const void *logits, int64_t request_stride, int64_t depth_stride, int half, int64_t num_requests,
                     int64_t num_depths, int64_t vocab_size, int64_t width, float sharpness, const void *parent,
                     const void *child, int64_t rank, int half_factors, int64_t *ids, float *logprobs, int32_t *scores,
                     int threads) {
    if (width > MAX_WIDTH || width > vocab_size) return 1;
    Draft a = {.logits = logits,
               .request_stride = request_stride,
               .depth_stride = depth_stride,
               .num_depths = num_depths,
               .vocab_size = vocab_size,
               .width = width,
               .sharpness = sharpness,
               .parent = parent,
               .child = child,
               .rank = rank,
               .ids = ids,
               .logprobs = logprobs,
               .scores = scores,
               .num_parents = parent ? width : 1};
    int64_t num_rows = num_requests * num_depths;
    EACH_ROW(marginal_row(&a, row, half))
    EACH_ROW(scored_row(&a, row, half_factors))
    return 0;
}
