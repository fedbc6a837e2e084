/* What a step is told: the model's matrices where they lie, the page store, and the step's rows. kernels/decode.py mirrors it.

   Legend: N rows, D model, H heads, n nope, R rope, V value, C latent rank, E experts, K top-k, I expert width. */
#pragma once
#include "vector.h"

#define PAGE 64   /* keys of a page */
#define BLOCK 128 /* of an FP8 scale, each way */
#define STRIP 16  /* outputs of a product that are made together */

/* Rows of weights, each `width` numbers, one behind the other; expert e lies e steps further. at NULL: there is none. */
typedef struct {
    const char *at;
    const float *scales;
    long kind, rows, width, scale_width, step, scale_step;
} Matrix;
typedef struct { const char *at; long kind; } Vector;
typedef struct { Matrix gate, up, down; } Mlp;
typedef struct {
    Vector input_norm, q_norm, kv_norm, post_norm, e_norm, h_norm, head_norm; /* the last three of MTP layers */
    Matrix q_a, q, kv_a, kv_b, o, router, eh;
    Mlp mlp, experts; /* mlp: the dense one, or the shared experts */
    const float *bias;
} Layer;
typedef struct {
    long dim, heads, nope, rope, value, rank, experts, top_k, groups, top_groups, normalise, main_layers, all_layers;
    long q_rank, mlp_width, expert_width; /* the widest of any layer */
    float eps, scale, routed_scale, rope_scale;
    const float *frequencies; /* (R/2,) radians a position */
    Matrix embedding, head;
    Vector norm;
    const Layer *layers;
} Model;
typedef struct {
    char *latents; /* (layers, pages, PAGE, C + R) */
    long kind, pages;
} Store;

INLINE Matrix of_expert(const Matrix *m, long e) {
    Matrix one = *m;
    one.at += e * m->step * size_of((int)m->kind);
    if (m->scales) one.scales += e * m->scale_step;
    return one;
}
