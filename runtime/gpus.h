/*
Peak speeds of GPUs, for MFU: the fraction of the peak that training uses (model FLOPs utilisation, Chowdhery
et al., PaLM, arXiv 2204.02311, appendix B).

    double peak = gpu_peak_flops("NVIDIA H100 80GB HBM3", "bf16");       // 989.4e12; 0: not known

The figures are for bf16 tensor cores with fp32 accumulation and dense matrices; data sheets also give twice
that, for sparse matrices. Names are the driver's. Any other name has no figure (a laptop's GPU, a part of a
GPU (MIG), a variant with other clocks), and neither has any other precision: no figure is better than a wrong
one.
*/
#ifndef RUNTIME_GPUS_H
#define RUNTIME_GPUS_H

#include <string.h>

typedef struct {
    const char* name;
    double bf16_tflops;
} Gpu;

static const Gpu known_gpus[] = {
    // NVIDIA A100 Tensor Core GPU data sheet (2021)
    {"NVIDIA A100-SXM4-40GB", 312},
    {"NVIDIA A100-SXM4-80GB", 312},
    {"NVIDIA A100-PCIE-40GB", 312},
    {"NVIDIA A100 80GB PCIe", 312},
    // NVIDIA H100 Tensor Core GPU Architecture white paper: SXM5 and PCIe
    {"NVIDIA H100 80GB HBM3", 989.4},
    {"NVIDIA H100 PCIe", 756},
    // NVIDIA H200 data sheet (1,979 sparse): the H100's chip with another memory
    {"NVIDIA H200", 989.4},
    // NVIDIA HGX B200 data sheet (4.5 PFLOPS sparse)
    {"NVIDIA B200", 2250},
    // NVIDIA Ada GPU Architecture white paper, appendix A
    {"NVIDIA GeForce RTX 4090", 165.2},
    // NVIDIA L40S data sheet
    {"NVIDIA L40S", 362.05},
};

// Peak floating-point operations per second; 0: not known. precision: PRECISION_NAME.
static inline double gpu_peak_flops(const char* name, const char* precision) {
    if (strcmp(precision, "bf16") != 0) return 0;
    for (size_t i = 0; i < sizeof(known_gpus) / sizeof(known_gpus[0]); i++)
        if (!strcmp(known_gpus[i].name, name)) return known_gpus[i].bf16_tflops * 1e12;
    return 0;
}

#endif
