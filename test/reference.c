/*
The implementation of test/reference.h: dev/cpu in fp64, for builds of every precision.
*/
#undef PRECISION_FP32
#undef PRECISION_FP64
#define PRECISION_FP64
#include "dev/cpu/embedding.h"
#include "dev/cpu/rmsnorm.h"
#include "dev/cpu/rope.h"
#include "dev/cpu/swiglu.h"
#include "dev/cpu/matmul.h"
#include "dev/cpu/classifier.h"
#include "dev/cpu/adamw.h"
#include "dev/cpu/gqa.h"
#include "dev/cpu/moba.h"
#include "dev/cpu/keynorm.h"
#include "dev/cpu/keys.h"
#include "dev/cpu/noise.h"
#include "test/reference.h"

void reference_embedding_forward(double* out, const int* tokens, const double* weight, int rows, int C) {
    embedding_forward(out, tokens, weight, rows, C, 0);
}

void reference_embedding_backward(double* dweight, const double* dout, const int* tokens, int rows, int C) {
    embedding_backward(dweight, dout, tokens, NULL, rows, C, 0);
}

void reference_rmsnorm_forward(double* out, double* rstd, const double* inp, const double* weight, int rows,
                               int C, float eps) {
    rmsnorm_forward(out, rstd, inp, weight, rows, C, eps, 0);
}

void reference_residual_rmsnorm_forward(double* sum, double* out, double* rstd, const double* residual,
                                        const double* branch, const double* weight, int rows, int C,
                                        float eps) {
    residual_rmsnorm_forward(sum, out, rstd, residual, branch, weight, rows, C, eps, 0);
}

void reference_rmsnorm_backward(double* dinp, double* dweight, const double* dout, const double* inp,
                                const double* weight, const double* rstd, int rows, int C) {
    rmsnorm_backward(dinp, dweight, dout, inp, weight, rstd, NULL, rows, C, 0);
}

void reference_rope_table(double* table, int T, int D, float theta) { rope_table(table, T, D, theta); }

void reference_swiglu_forward(double* out, const double* gate_up, int rows, int F) {
    swiglu_forward(out, gate_up, rows, F, 0);
}

void reference_swiglu_backward(double* dgate_up, const double* dout, const double* gate_up, int rows, int F) {
    swiglu_backward(dgate_up, dout, gate_up, rows, F, 0);
}

void reference_matmul_forward(double* out, const double* inp, const double* weight, int rows, int in_channels,
                              int out_channels) {
    matmul_forward(out, inp, weight, rows, in_channels, out_channels, 0);
}

void reference_matmul_backward(double* dinp, double* dweight, const double* dout, const double* inp,
                               const double* weight, int rows, int in_channels, int out_channels) {
    matmul_backward(dinp, dweight, dout, inp, weight, rows, in_channels, out_channels, 0);
}

void reference_fused_classifier(double* logits, double* losses, const int* targets, double dloss, int rows,
                                int V, int Vp, int write_gradient) {
    fused_classifier(logits, losses, targets, dloss, rows, V, Vp, write_gradient, 0);
}

void reference_global_norm(double* norm, const double* grads, size_t count) {
    double* partials = (double*)malloc_or_fail(global_norm_partials(count) * sizeof(double), "partial sums");
    double sum;
    sum_of_squares(&sum, partials, grads, count, 0);
    global_norm(norm, &sum, 1, 0);
    free(partials);
}

void reference_adamw_update(double* params, double* exp_avg, double* exp_avg_sq, const double* grads,
                            const double* norm, const double* decays, size_t count, AdamW settings) {
    adamw_update(params, NULL, exp_avg, exp_avg_sq, grads, norm, decays, count, settings, 0);
}

// The tensors of a call; no call writes to a tensor that its caller passes as const.
static AttentionTensors reference_tensors(const double* out, const double* lse, const int* selected,
                                          const double* qkv, const int* kv_of_q, size_t workspace_bytes) {
    AttentionTensors x;
    memset(&x, 0, sizeof(x));
    x.out = (double*)out, x.lse = (double*)lse, x.selected = (int*)selected;
    x.qkv = qkv, x.kv_of_q = kv_of_q;
    x.workspace = malloc_or_fail(workspace_bytes, "attention");
    return x;
}

void reference_attention_forward(double* out, double* lse, const double* qkv, const int* kv_of_q,
                                 const AttentionShape* s) {
    const AttentionTensors x =
        reference_tensors(out, lse, NULL, qkv, kv_of_q, attention_forward_workspace(s));
    attention_forward(&x, s, 0);
    free(x.workspace);
}

void reference_attention_backward(double* dqkv, const double* dout, const double* out, const double* lse,
                                  const double* qkv, const int* kv_of_q, const AttentionShape* s) {
    AttentionTensors x = reference_tensors(out, lse, NULL, qkv, kv_of_q, attention_backward_workspace(s));
    x.dqkv = dqkv, x.dout = dout;
    attention_backward(&x, s, 0);
    free(x.workspace);
}

void reference_flashmoba_forward(double* out, double* lse, const int* selected, const double* qkv,
                                 const int* kv_of_q, const AttentionShape* s) {
    const AttentionTensors x =
        reference_tensors(out, lse, selected, qkv, kv_of_q, flashmoba_forward_workspace(s));
    flashmoba_local_forward(&x, s);
    if (s->K > 1) flashmoba_routed_forward(&x, s);
    free(x.workspace);
}

void reference_flashmoba_select(int* selected, double* centroids, const double* qkv, const int* kv_of_q,
                                const AttentionShape* s) {
    AttentionTensors x =
        reference_tensors(NULL, NULL, selected, qkv, kv_of_q, flashmoba_forward_workspace(s));
    x.centroids = centroids;
    moba_centroids(centroids, qkv, s);
    if (s->K > 1) flashmoba_route(&x, s);
    free(x.workspace);
}

void reference_flashmoba_backward(double* dqkv, const double* dout, const double* out, const double* lse,
                                  const int* selected, const double* qkv, const int* kv_of_q,
                                  const AttentionShape* s) {
    AttentionTensors x = reference_tensors(out, lse, selected, qkv, kv_of_q, flashmoba_backward_workspace(s));
    x.dqkv = dqkv, x.dout = dout;
    flashmoba_backward(&x, s, 0);
    free(x.workspace);
}

void reference_key_rms(double* rms, double* sums, const double* qkv, int B, int T, int H, int G, int D) {
    key_rms(rms, sums, qkv, B, T, H, G, D, 0);
}

void reference_key_weight_norm(double* norm, const double* wk, const double* gain, int G, int D, int C) {
    key_weight_norm(norm, wk, gain, G, D, C, 0);
}

void reference_keys_forward(double* qkv, double* raw, double* centroids, const double* weight,
                            const double* table, int B, int T, int start, int H, int G, int D, int S,
                            int taps) {
    keys_forward(qkv, raw, centroids, weight, table, B, T, start, H, G, D, S, taps, 0);
}

void reference_keys_backward(double* dqkv, double* dweight, const double* raw, const double* weight,
                             const double* table, int B, int T, int H, int G, int D, int taps) {
    keys_backward(dqkv, dweight, raw, weight, table, NULL, B, T, H, G, D, taps, 0);
}

void reference_attention_noise(double* noised, const double* out, int B, int T, int H, int D, float alpha,
                               uint64_t seed, uint64_t draws, long first_sequence) {
    const AttentionNoise noise = {noised, alpha, seed, draws, (uint64_t)first_sequence};
    attention_noise(&noise, out, B, T, 0, H, D);
}
