/* The one product that every kernel here is made of: an 8 x 32 tile in registers, bfloat16 pairs times bfloat16 pairs.

   vdpbf16ps multiplies sixteen lanes of two bfloat16 and adds both products to a float32 lane. So a matrix product wants
     A   words (pairs along the sum) [P][rows]          broadcast, one word a row
     B   words                        [P][32]  a panel   sixteen lanes a register, two registers a panel
   with P = half the length of the sum. Two ways make words: `pack_lanes` transposes 32-bit words (the sum runs along a row of
   memory), `pack_pairs` interleaves two rows (the sum runs down the rows). The sum is never cut: it is added in order of P by
   one thread, so results do not depend on the number of threads.
   Legend: P pairs, W width in lanes (a multiple of 16; the last panel may be half full). */
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;
#define ROWS 16 /* of a block of A: two tiles */
#define LANES 32 /* of a panel of B */
#define INLINE static inline __attribute__((always_inline))

INLINE long round_up(long n, long to) { return (n + to - 1) / to * to; }
INLINE __m512 widen(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
INLINE __m512 load_bf16(const bf16 *p) { return widen(_mm256_loadu_si256((const __m256i *)p)); }
INLINE void store_bf16(bf16 *p, __m512 x) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(x)); }

/* 2^(x log2 e): to 2 float32 ulp on [-87, 88], 0 below. The order of max's operands keeps a NaN. */
INLINE __m512 exp512(__m512 x) {
    __m512 y = _mm512_mul_ps(_mm512_max_ps(_mm512_set1_ps(-104.0f), x), _mm512_set1_ps(1.44269504f));
    __m512 n = _mm512_roundscale_ps(y, 0), r = _mm512_sub_ps(y, n);
    __m512 p = _mm512_set1_ps(1.3333558e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

INLINE void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 8] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
    }
}

/* Sixteen rows of bfloat16 become lanes: out[p * stride + i] = pair p of rows[i]; a null row is zeros. width: multiple of 16. */
static void pack_lanes(uint32_t *out, long stride, const bf16 *const rows[ROWS], long width) {
    const long words = width / 2;
    for (long p = 0; p < words; p += 16) {
        const __mmask16 keep = words - p >= 16 ? 0xffff : (1u << (words - p)) - 1;
        __m512i r[16];
        for (int i = 0; i < 16; i++)
            r[i] = rows[i] ? _mm512_maskz_loadu_epi32(keep, (const uint32_t *)rows[i] + p) : _mm512_setzero_si512();
        transpose16(r);
        const long n = words - p < 16 ? words - p : 16;
        for (long i = 0; i < n; i++) _mm512_storeu_si512(out + (p + i) * stride, r[i]);
    }
}

/* Lanes l of two rows become words of both: the low and high sixteen. */
INLINE void interleave(__m512i a, __m512i b, __m512i *low, __m512i *high) {
    const __m512i at = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36,
                                        4, 35, 3, 34, 2, 33, 1, 32, 0);
    *low = _mm512_permutex2var_epi16(a, at, b);
    *high = _mm512_permutex2var_epi16(a, _mm512_add_epi16(at, _mm512_set1_epi16(16)), b);
}

/* Two rows become row p of every panel: panels[w / 32][p][w % 32] = (a[w], b[w]); a null row is zeros. pairs: P of the panels. */
static void pack_pairs(uint32_t *panels, long pairs, long p, const bf16 *a, const bf16 *b, long width) {
    for (long w = 0; w < width; w += LANES) {
        const __mmask32 keep = width - w >= LANES ? 0xffffffff : 0xffff;
        __m512i low, high;
        interleave(a ? _mm512_maskz_loadu_epi16(keep, a + w) : _mm512_setzero_si512(),
                   b ? _mm512_maskz_loadu_epi16(keep, b + w) : _mm512_setzero_si512(), &low, &high);
        uint32_t *out = panels + (w / LANES * pairs + p) * LANES;
        _mm512_store_si512(out, low);
        _mm512_store_si512(out + 16, high);
    }
}

/* Rows become lanes of panels: panels[row / 32][p][row % 32]; `rows` is a multiple of 16, `row_stride` in values. */
static void pack_rows(uint32_t *panels, const bf16 *x, long rows, long row_stride, long width) {
    for (long r = 0; r < rows; r += ROWS) {
        const bf16 *at[ROWS];
        for (int i = 0; i < ROWS; i++) at[i] = x + (r + i) * row_stride;
        pack_lanes(panels + r / LANES * (width / 2) * LANES + r % LANES, LANES, at, width);
    }
}

INLINE void tile(const int nv, long pairs, const uint32_t *a, long a_stride, const uint32_t *b, float *c, long ldc, int add) {
    __m512 acc[8][2];
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < nv; j++) acc[i][j] = add ? _mm512_loadu_ps(c + i * ldc + 16 * j) : _mm512_setzero_ps();
    for (long p = 0; p < pairs; p++, a += a_stride, b += LANES) {
        __m512bh bv[2];
        for (int j = 0; j < nv; j++) bv[j] = (__m512bh)_mm512_load_si512(b + 16 * j);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            const __m512bh av = (__m512bh)_mm512_set1_epi32(a[i]);
            for (int j = 0; j < nv; j++) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], bv[j], av);
        }
    }
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < nv; j++) _mm512_storeu_ps(c + i * ldc + 16 * j, acc[i][j]);
}

/* c (rows up to 16, width) = or += a (pairs words of 16 rows, a_stride apart) times panels (each panel_pairs long) of B. */
static void block_rows(long rows, long pairs, const uint32_t *a, long a_stride, const uint32_t *panels, long panel_pairs, long width,
                       float *c, long ldc, int add) {
    for (long w = 0; w < width; w += LANES) {
        const uint32_t *b = panels + w * panel_pairs;
        for (int i = 0; i < ROWS && i < rows; i += 8) {
            if (width - w >= LANES) tile(2, pairs, a + i, a_stride, b, c + i * ldc + w, ldc, add);
            else tile(1, pairs, a + i, a_stride, b, c + i * ldc + w, ldc, add);
        }
    }
}

static void block(long pairs, const uint32_t *a, long a_stride, const uint32_t *panels, long panel_pairs, long width, float *c,
                  long ldc, int add) {
    block_rows(ROWS, pairs, a, a_stride, panels, panel_pairs, width, c, ldc, add);
}

/* Scratch of a thread: 64-byte aligned pieces of one allocation. Call with base null to learn the size. */
typedef struct {
    char *base;
    size_t used;
} Arena;
INLINE void *take(Arena *arena, size_t bytes) {
    void *at = arena->base + arena->used;
    arena->used += (bytes + 63) / 64 * 64 + 64; /* a line between pieces: no two start at the same cache set */
    return at;
}
INLINE void *allocate(size_t bytes) {
    void *p = aligned_alloc(64, round_up(bytes, 4096));
    if (!p) abort();
    return p;
}
