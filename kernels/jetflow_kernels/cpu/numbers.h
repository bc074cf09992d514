/* fp32 and bf16, and loops over rows.
 *
 * `half` is a constant in everything that is inlined, so that the compiler makes two loops of each. Without -fopenmp
 * the pragmas mean nothing, and one thread computes all rows.
 */
#include <stdint.h>
#include <string.h>

#define LANES 32
#define INLINE static inline __attribute__((always_inline))
#define ROW_FUNCTION static __attribute__((noinline))

/* `call` for each row; every thread has one run of rows. */
#define EACH_ROW(call)                                                     \
    if (threads > 1) {                                                     \
        _Pragma("omp parallel for schedule(static) num_threads(threads)")  \
        for (int64_t row = 0; row < num_rows; row++) call;                 \
    } else {                                                               \
        for (int64_t row = 0; row < num_rows; row++) call;                 \
    }

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* a * b + c; one rounding on processors that have an instruction for it. */
INLINE float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

/* To the nearest bf16, ties to even; NaN stays NaN. */
INLINE uint16_t to_bf16(float x) {
    uint32_t bits = bits_of(x);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

INLINE float load(const void *x, int64_t i, int half) {
    return half ? float_of((uint32_t)((const uint16_t *)x)[i] << 16) : ((const float *)x)[i];
}

INLINE void store(void *out, int64_t i, float x, int half) {
    if (half)
        ((uint16_t *)out)[i] = to_bf16(x);
    else
        ((float *)out)[i] = x;
}

INLINE float rounded(float x, int half) { return half ? float_of((uint32_t)to_bf16(x) << 16) : x; }

INLINE const char *at(const void *x, int64_t i, int half) { return (const char *)x + i * (half ? 2 : 4); }

INLINE char *at_out(void *x, int64_t i, int half) { return (char *)x + i * (half ? 2 : 4); }

/* e^x within 2 units in the last place, by 2^n * e^r with |r| <= ln(2) / 2; the polynomial is that of Cephes. */
INLINE float exponential(float x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: what is added to it is rounded to whole numbers */
    x = x > 89.0f ? 89.0f : x;       /* infinite from 88.8 on */
    x = x < -104.0f ? -104.0f : x;
    float shifted = multiply_add(x, 1.44269504088896341f, magic);
    float n = shifted - magic;
    float r = multiply_add(n, -0.693359375f, x); /* ln(2) in two parts, the first of few bits */
    r = multiply_add(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = multiply_add(p, r, 1.3981999507e-3f);
    p = multiply_add(p, r, 8.3334519073e-3f);
    p = multiply_add(p, r, 4.1665795894e-2f);
    p = multiply_add(p, r, 1.6666665459e-1f);
    p = multiply_add(p, r, 5.0000001201e-1f);
    p = multiply_add(p, r * r, r) + 1.0f;
    /* 2^n as two factors, each of which a float can hold. */
    int32_t power = (int32_t)(bits_of(shifted) - bits_of(magic));
    int32_t part = power >> 1;
    return p * float_of((uint32_t)(part + 127) << 23) * float_of((uint32_t)(power - part + 127) << 23);
}
