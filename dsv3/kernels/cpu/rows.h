/* What is done to one row, by the kernels that do only that and by those that go on with the row while it is in the cache. */
#pragma once
#include "tile.h"

INLINE __m512 sigmoid(__m512 x) {
    return _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_add_ps(_mm512_set1_ps(1.0f), exp512(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

/* y = silu(gate) up weight, rounded once. */
INLINE void swiglu_row(const bf16 *gate, const bf16 *up, float weight, bf16 *y, long I) {
    const __m512 w = _mm512_set1_ps(weight);
    for (long i = 0; i < I; i += 16) {
        const __m512 g = load_bf16(gate + i), u = load_bf16(up + i);
        store_bf16(y + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), u), w));
    }
}

/* y = x weight / sqrt(mean x^2 + eps), rounded once; returns the factor. */
INLINE float norm_row(const bf16 *x, const float *weight, bf16 *y, long D, float eps) {
    __m512 sum = _mm512_setzero_ps();
    for (long d = 0; d < D; d += 16) {
        const __m512 v = load_bf16(x + d);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    const float factor = 1.0f / sqrtf(_mm512_reduce_add_ps(sum) / D + eps);
    for (long d = 0; d < D; d += 16)
        store_bf16(y + d, _mm512_mul_ps(_mm512_mul_ps(load_bf16(x + d), _mm512_set1_ps(factor)), _mm512_loadu_ps(weight + d)));
    return factor;
}
