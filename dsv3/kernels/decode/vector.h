/* Vectors of the machine's own width in GNU C, so that one text serves AVX-512, AVX2 and NEON.

   Sums over lanes are folded by one tree, whatever stands beside them: a fold of sixteen vectors gives each the same bits as
   a fold of one. What a compiler may fuse is one product and one sum, everywhere the same. Exponentials are a polynomial, to about 1 float32 ulp. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined __AVX512F__
#include <immintrin.h>
#define LANES 16
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define COUNT 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#define SAME(x) x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x
#elif defined __AVX__
#define LANES 8
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#define COUNT 0, 1, 2, 3, 4, 5, 6, 7
#define SAME(x) x, x, x, x, x, x, x, x
#else
#define LANES 4
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#define COUNT 0, 1, 2, 3
#define SAME(x) x, x, x, x
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#ifndef __has_builtin
#define __has_builtin(x) 0
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef int16_t vs __attribute__((vector_size(2 * LANES)));
typedef int8_t vb __attribute__((vector_size(LANES)));

#if __has_builtin(__builtin_shufflevector)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

enum { FLOAT32, BFLOAT16, FP8 }; /* how numbers lie in memory */

INLINE long size_of(int kind) { return kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1; }
INLINE long round_up(long n, long to) { return (n + to - 1) / to * to; }
INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long most(long a, long b) { return a > b ? a : b; }
INLINE vf splat(float x) { return (vf){SAME(x)}; }
INLINE vf load(const float *p) {
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}
INLINE void store(float *p, vf x) { memcpy(p, &x, sizeof x); }
/* x stays in a register: compilers would rather read it from memory each time. */
#if defined __x86_64__
#define KEEP(x) __asm__("" : "+v"(x))
#elif defined __aarch64__
#define KEEP(x) __asm__("" : "+w"(x))
#else
#define KEEP(x) (void)0
#endif
INLINE vf choose(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }

/* LANES numbers become float32. An e4m3 code moved to a float's place is 2^-120 of its value, which `scale` must make up for; the
   two codes for no number, which no cast writes, read as 480. */
INLINE vf widen(int kind, const char *p, vf scale) {
    if (kind == FLOAT32) return load((const float *)p);
    if (kind == BFLOAT16) {
        vh h;
        memcpy(&h, p, sizeof h);
        return (vf)(__builtin_convertvector(h, vu) << 16);
    }
    vb b;
    memcpy(&b, p, sizeof b);
#if defined __AVX512F__ /* one instruction, which gcc does not find */
    const vi wide = (vi)_mm512_cvtepi8_epi32((__m128i)b);
#else
    const vi wide = __builtin_convertvector(__builtin_convertvector(b, vs), vi);
#endif
    return (vf)((wide << 20) & (int32_t)0x87f00000) * scale;
}
INLINE uint16_t to_bf16(float x) { /* to the nearest, ties to even; a NaN stays one */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
INLINE float from_bf16(uint16_t h) {
    const uint32_t bits = (uint32_t)h << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* 2^x; 0 below -126. A NaN passes. */
INLINE vf exp2v(vf x) {
    const vi gone = x < -126.0f;
    x = choose(x > 127.0f, splat(127.0f), x);
    const vf n = (x + 12582912.0f) - 12582912.0f, r = x - n;
    vf p = splat(1.5252734e-5f);
    p = p * r + 1.5403530e-4f;
    p = p * r + 1.3333558e-3f;
    p = p * r + 9.6181291e-3f;
    p = p * r + 5.5504109e-2f;
    p = p * r + 2.4022651e-1f;
    p = p * r + 6.9314718e-1f;
    p = p * r + 1.0f;
    return (vf)(((vi)p + (__builtin_convertvector(n, vi) << 23)) & ~gone);
}
#define LOG2E 1.44269504f
INLINE vf silu(vf x) { return x / (1.0f + exp2v(x * -LOG2E)); }

/* Sums, or maxima, over the lanes of LANES vectors become the lanes of one. */
INLINE vf add(vf a, vf b) { return a + b; }
INLINE vf greater(vf a, vf b) { return choose(a > b, a, b); }
#define HALVE(n, with) \
    UNROLL for (int i = 0; i < (n); i++) a[i] = with(PICK(a[i], a[i + (n)], LOW), PICK(a[i], a[i + (n)], HIGH))
#if LANES == 16
#define FOLD(with) HALVE(8, with); HALVE(4, with); HALVE(2, with); HALVE(1, with)
#elif LANES == 8
#define FOLD(with) HALVE(4, with); HALVE(2, with); HALVE(1, with)
#else
#define FOLD(with) HALVE(2, with); HALVE(1, with)
#endif
INLINE vf fold(vf *a) {
    FOLD(add);
    return a[0];
}
INLINE vf fold_greatest(vf *a) {
    FOLD(greater);
    return a[0];
}
INLINE float sum(vf x) {
    float t[LANES];
    store(t, x);
    UNROLL for (int i = 4; i < LANES; i++) t[i % 4] += t[i];
    return (t[0] + t[2]) + (t[1] + t[3]);
}
/* LANES rows of LANES become columns. */
INLINE void transpose(vf *r) {
    vf t[LANES];
    UNROLL for (int round = 0; round < (LANES == 16 ? 4 : LANES == 8 ? 3 : 2); round++) {
        UNROLL for (int i = 0; i < LANES / 2; i++) {
            t[2 * i] = PICK(r[i], r[i + LANES / 2], LOW);
            t[2 * i + 1] = PICK(r[i], r[i + LANES / 2], HIGH);
        }
        UNROLL for (int i = 0; i < LANES; i++) r[i] = t[i];
    }
}
