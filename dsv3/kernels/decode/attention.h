/* Latent attention of a few rows of one sequence over its pages, in the absorbed form. */
#pragma once
#include "model.h"

#define QUERIES 64 /* of a task: rows times heads */

typedef struct { float *absorbed, *keys, *page, *up, *scores, *sums, *greatest, *totals; } AttentionWork;

/* Floats that `carve_attention` takes. */
long attention_floats(const Model *m);
AttentionWork carve_attention(const Model *m, float *at);

/* Rows [0, rows) at positions position, position + 1, ... and heads [head, head + heads), heads · rows <= QUERIES.
   q: (rows, H·(n + R)), ropes not yet turned; cos, sin: (rows, R/2); out: (rows, H·V); latents: of this layer. */
void attend(const Model *m, const Layer *layer, const AttentionWork *work, const char *latents, int kind, const int64_t *pages,
            long first_key, long position, long rows, long head, long heads, const float *q, const float *cos,
            const float *sin, float *out);
