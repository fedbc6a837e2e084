/* The two products that a step is made of. Both give every element one order of addition, however many rows go together. */
#pragma once
#include "model.h"

/* y[r][j] = x[r] · row (first + j) of m, for 1 to 4 rows r and STRIP outputs j; outputs beyond m's rows are no numbers.
   Lane l adds the products l, l + LANES, ...; then the lanes are folded. */
void strip(const Matrix *m, long first, long rows, const float *const x[4], float y[4][STRIP]);

/* m as seen from `first`, for so many rows of x: where weights are read often, float32 copies of the strip in `panel`. */
Matrix for_rows(const Matrix *m, long *first, long rows, float *panel);

/* y[r][c] = (add ? y[r][c] : 0) + sum_k a[r][k] · b[k][c], k in order. width: a multiple of LANES; strides in floats. */
void mix(long rows, long width, long K, const float *a, long a_row, const float *b, long b_row, float *y, long y_row, int add);

/* Row r of m as float32, zeros up to a multiple of LANES. */
void widen_row(const Matrix *m, long r, float *out);
/* n numbers as float32, zeros up to a multiple of LANES. */
void widen_run(int kind, const char *at, long n, float scale, float *out);

/* y = x · rsqrt(mean x² + eps) · w, n numbers. */
void rms_norm(const float *x, Vector w, long n, float eps, float *y);
