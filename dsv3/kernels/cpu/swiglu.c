/* SwiGLU, forward and backward: bfloat16 in and out, all else in float32. See kernels/swiglu.py. Legend: R rows, I width. */
#include "rows.h"

/* y (R, I); rows of gate and up are as far apart as said; weights (R) or null. */
void swiglu_forward(const bf16 *gate, const bf16 *up, const float *weights, bf16 *y, long R, long I, long gate_row, long up_row,
                    int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < R; r++) swiglu_row(gate + r * gate_row, up + r * up_row, weights ? weights[r] : 1.0f, y + r * I, I);
}

/* d_gate, d_up (R, I), d_weights (R) or null. */
void swiglu_backward(const bf16 *dy, const bf16 *gate, const bf16 *up, const float *weights, bf16 *d_gate, bf16 *d_up,
                     float *d_weights, long R, long I, long gate_row, long up_row, int threads) {
    const __m512 one = _mm512_set1_ps(1.0f);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < R; r++) {
        const __m512 weight = _mm512_set1_ps(weights ? weights[r] : 1.0f);
        __m512 dot = _mm512_setzero_ps();
        for (long i = 0; i < I; i += 16) {
            const __m512 g = load_bf16(gate + r * gate_row + i), u = load_bf16(up + r * up_row + i), d = load_bf16(dy + r * I + i);
            const __m512 s = sigmoid(g), silu = _mm512_mul_ps(g, s), dw = _mm512_mul_ps(d, weight);
            const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one));
            dot = _mm512_fmadd_ps(d, _mm512_mul_ps(silu, u), dot);
            store_bf16(d_up + r * I + i, _mm512_mul_ps(dw, silu));
            store_bf16(d_gate + r * I + i, _mm512_mul_ps(_mm512_mul_ps(dw, u), slope));
        }
        if (d_weights) d_weights[r] = _mm512_reduce_add_ps(dot);
    }
}
