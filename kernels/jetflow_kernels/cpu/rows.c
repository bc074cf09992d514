/* What a CPU computes of each row alone: norms, the rotation and store of q, k and v, and the product of an MLP.
 *
 * Every row goes through the same function, whatever the number of rows and threads, and that function has one order of
 * operations: sums have LANES partial sums in a fixed order, nothing else is reassociated, and a product is fused with
 * a sum only where `multiply_add` says so: a compiler left to choose might fuse in a loop's vectors and not in what is
 * left over at its end. So the result of a row is the same bit for bit in every batch.
 *
 * Activations are fp32, or bf16 where `half` is set; those are computed in fp32 and rounded where plain torch rounds.
 */
#include "numbers.h"

#define MAX_HEAD_DIM 512

/* 1 / sqrt(mean(x^2) + eps) */
INLINE float inverse_rms(const void *x, int64_t n, float eps, int half) {
    float sums[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            float value = load(x, i + lane, half);
            sums[lane] = multiply_add(value, value, sums[lane]);
        }
    for (int lane = 0; i + lane < n; lane++) {
        float value = load(x, i + lane, half);
        sums[lane] = multiply_add(value, value, sums[lane]);
    }
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; lane++) sums[lane] += sums[lane + width];
    return 1.0f / __builtin_sqrtf(sums[0] / (float)n + eps);
}

INLINE void norm_row_of(const void *x, const void *weight, void *restrict out, int64_t n, float eps, int half) {
    float scale = inverse_rms(x, n, eps, half);
    for (int64_t i = 0; i < n; i++)
        store(out, i, rounded(load(x, i, half) * scale, half) * load(weight, i, half), half);
}

ROW_FUNCTION void norm_row(const void *x, const void *weight, void *out, int64_t n, float eps, int half) {
    if (half)
        norm_row_of(x, weight, out, n, eps, 1);
    else
        norm_row_of(x, weight, out, n, eps, 0);
}

/* x [num_rows, n] with `stride` elements from row to row, weight [n], out [num_rows, n]. */
void rms_norm(const void *x, int64_t stride, const void *weight, void *out, int64_t num_rows, int64_t n, float eps,
              int half, int threads) {
    EACH_ROW(norm_row(at(x, row * stride, half), weight, at_out(out, row * n, half), n, eps, half))
}

INLINE void silu_row_of(const void *x, void *restrict out, int64_t n, int half) {
    for (int64_t i = 0; i < n; i++) {
        float gate = load(x, i, half);
        float silu = rounded(gate / (1.0f + exponential(-gate)), half);
        store(out, i, silu * load(x, n + i, half), half);
    }
}

ROW_FUNCTION void silu_row(const void *x, void *out, int64_t n, int half) {
    if (half)
        silu_row_of(x, out, n, 1);
    else
        silu_row_of(x, out, n, 0);
}

/* x [num_rows, 2 n], gate then up, with `stride` elements from row to row; out [num_rows, n]. */
void silu_mul(const void *x, int64_t stride, void *out, int64_t num_rows, int64_t n, int half, int threads) {
    EACH_ROW(silu_row(at(x, row * stride, half), at_out(out, row * n, half), n, half))
}

typedef struct {
    const void *qkv, *weight, *cos, *sin;
    const int64_t *slots;
    void *q, *k_pages, *v_pages;
    int64_t stride, num_heads, num_kv_heads, head_dim;
    float eps;
} Heads;

/* One head's norm (none without weight) and rotation. */
INLINE void rotated_head(const void *x, const void *weight, const void *cos, const void *sin, void *restrict out,
                         int64_t n, float eps, int half, int half_out) {
    float y[MAX_HEAD_DIM];
    if (weight) {
        float scale = inverse_rms(x, n, eps, half);
        for (int64_t i = 0; i < n; i++)
            y[i] = rounded(rounded(load(x, i, half) * scale, half) * load(weight, i, half), half);
    } else {
        for (int64_t i = 0; i < n; i++) y[i] = load(x, i, half);
    }
    int64_t middle = n / 2;
    for (int64_t i = 0; i < middle; i++) {
        float kept = rounded(y[i] * load(cos, i, half), half);
        store(out, i, rounded(multiply_add(y[middle + i], load(sin, i, half), kept), half), half_out);
    }
    for (int64_t i = 0; i < middle; i++) {
        float kept = rounded(y[middle + i] * load(cos, middle + i, half), half);
        store(out, middle + i, rounded(multiply_add(y[i], load(sin, middle + i, half), kept), half), half_out);
    }
}

INLINE void heads_row_of(const Heads *a, int64_t row, int half, int half_pages) {
    int64_t n = a->head_dim, num_rotated = a->num_heads + a->num_kv_heads;
    int64_t slot = a->slots[row] * a->num_kv_heads * n;
    const void *x = at(a->qkv, row * a->stride, half);
    const void *cos = at(a->cos, row * n, half), *sin = at(a->sin, row * n, half);
    for (int64_t head = 0; head < num_rotated; head++) {
        const void *from = at(x, head * n, half), *weight = a->weight ? at(a->weight, head * n, half) : 0;
        if (head < a->num_heads)
            rotated_head(from, weight, cos, sin, at_out(a->q, (row * a->num_heads + head) * n, half), n, a->eps, half,
                         half);
        else
            rotated_head(from, weight, cos, sin,
                         at_out(a->k_pages, slot + (head - a->num_heads) * n, half_pages), n, a->eps, half, half_pages);
    }
    const void *v = at(x, num_rotated * n, half);
    void *restrict v_out = at_out(a->v_pages, slot, half_pages);
    for (int64_t i = 0; i < a->num_kv_heads * n; i++) store(v_out, i, load(v, i, half), half_pages);
}

ROW_FUNCTION void heads_row(const Heads *a, int64_t row, int half, int half_pages) {
    if (!half)
        heads_row_of(a, row, 0, 0);
    else if (half_pages)
        heads_row_of(a, row, 1, 1);
    else
        heads_row_of(a, row, 1, 0);
}

/* qkv [num_rows, num_heads + 2 num_kv_heads, head_dim] with `stride` elements from row to row; weight of each head of q
 * and k, or NULL; cos and sin [num_rows, head_dim], the first half of sin negative; q [num_rows, num_heads, head_dim];
 * pages [num_slots, num_kv_heads, head_dim], bf16 where `half_pages` is set. Returns 0, or 1, with nothing written,
 * where a slot is not one of them. */
int qk_norm_rope_store(const void *qkv, int64_t stride, const void *weight, const void *cos, const void *sin,
                       const int64_t *slots, void *q, void *k_pages, void *v_pages, int64_t num_rows, int64_t num_slots,
                       int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, float eps, int half, int half_pages,
                       int threads) {
    for (int64_t row = 0; row < num_rows; row++)
        if (slots[row] < 0 || slots[row] >= num_slots) return 1;
    Heads a = {qkv, weight, cos, sin, slots, q, k_pages, v_pages, stride, num_heads, num_kv_heads, head_dim, eps};
    EACH_ROW(heads_row(&a, row, half, half_pages))
    return 0;
}
