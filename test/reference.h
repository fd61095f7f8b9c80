/*
The reference of the CUDA kernels' tests: the operations of dev/cpu in double precision, compiled as C into
one object. Tests in any language, precision and device link with it.

    reference_rmsnorm_forward(out, rstd, inp, weight, rows, C, 1e-5f);

Names, shapes and the order of arguments are those of dev/cpu, without the stream. The functions of attention
take their tensors one by one, because floatX and float_acc of dev/cpu are double here. The functions allocate
their own workspaces.
*/
#ifndef TEST_REFERENCE_H
#define TEST_REFERENCE_H

#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include "runtime/adamw.h"
#include "runtime/attention_shape.h"

#ifdef __cplusplus
extern "C" {
#endif

void reference_embedding_forward(double* out, const int* tokens, const double* weight, int rows, int C);
void reference_embedding_backward(double* dweight, const double* dout, const int* tokens, int rows, int C);

void reference_rmsnorm_forward(double* out, double* rstd, const double* inp, const double* weight, int rows,
                               int C, float eps);
void reference_residual_rmsnorm_forward(double* sum, double* out, double* rstd, const double* residual,
                                        const double* branch, const double* weight, int rows, int C,
                                        float eps);
void reference_rmsnorm_backward(double* dinp, double* dweight, const double* dout, const double* inp,
                                const double* weight, const double* rstd, int rows, int C);

void reference_rope_table(double* table, int T, int D, float theta);

void reference_swiglu_forward(double* out, const double* gate_up, int rows, int F);
void reference_swiglu_backward(double* dgate_up, const double* dout, const double* gate_up, int rows, int F);

void reference_matmul_forward(double* out, const double* inp, const double* weight, int rows, int in_channels,
                              int out_channels);
void reference_matmul_backward(double* dinp, double* dweight, const double* dout, const double* inp,
                               const double* weight, int rows, int in_channels, int out_channels);

void reference_fused_classifier(double* logits, double* losses, const int* targets, double dloss, int rows,
                                int V, int Vp, int write_gradient);

void reference_global_norm(double* norm, const double* grads, size_t count);
void reference_adamw_update(double* params, double* exp_avg, double* exp_avg_sq, const double* grads,
                            const double* norm, const double* decays, size_t count, AdamW settings);

void reference_attention_forward(double* out, double* lse, const double* qkv, const int* kv_of_q,
                                 const AttentionShape* s);
void reference_attention_backward(double* dqkv, const double* dout, const double* out, const double* lse,
                                  const double* qkv, const int* kv_of_q, const AttentionShape* s);

// The forward and backward passes use the caller's selection; reference_flashmoba_select() makes one.
void reference_flashmoba_forward(double* out, double* lse, const int* selected, const double* qkv,
                                 const int* kv_of_q, const AttentionShape* s);
void reference_flashmoba_select(int* selected, double* centroids, const double* qkv, const int* kv_of_q,
                                const AttentionShape* s);
void reference_flashmoba_backward(double* dqkv, const double* dout, const double* out, const double* lse,
                                  const int* selected, const double* qkv, const int* kv_of_q,
                                  const AttentionShape* s);

void reference_key_rms(double* rms, double* sums, const double* qkv, int B, int T, int H, int G, int D);
void reference_key_weight_norm(double* norm, const double* wk, const double* gain, int G, int D, int C);

void reference_keys_forward(double* qkv, double* raw, double* centroids, const double* weight,
                            const double* table, int B, int T, int start, int H, int G, int D, int S,
                            int taps);

void reference_keys_backward(double* dqkv, double* dweight, const double* raw, const double* weight,
                             const double* table, int B, int T, int H, int G, int D, int taps);

void reference_attention_noise(double* noised, const double* out, int B, int T, int H, int D, float alpha,
                               uint64_t seed, uint64_t draws, long first_sequence);

#ifdef __cplusplus
}
#endif

// Call this before the other functions. Under the thread sanitizer it limits OpenMP to one thread, because
// the sanitizer does not know OpenMP's barriers.
static inline void reference_start(void) {
#if defined(__SANITIZE_THREAD__)
    omp_set_num_threads(1);
#endif
}

#endif
