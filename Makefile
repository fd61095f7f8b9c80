# moba.c: every build. `make help` lists the targets.
#
#   make                                          the trainer for this machine, with every kind; the tokenizer
#   make DEVICE=cpu PRECISION=fp32
#   make ATTN=flashmoba GQA=kdgqa KCONV=3         dense attention and flashmoba only; the three are its defaults
#   make DEVICE=cuda PRECISION=bf16               for this machine's GPU, or for all of CUDA_ARCHS without a GPU
#   make DEVICE=simt PRECISION=bf16               the CUDA program on an emulator: for tests, on any machine
#
# All programs are in build/, with their flags in their names; build/train_gpt is the one built last.

ifeq ($(origin CC),default)
  CC := gcc
endif
ifeq ($(origin CXX),default)
  CXX := g++
endif
BUILD ?= build

# ----------------------------------------------------------------------------
# CUDA, if it is installed: 12.4 or newer

NVCC ?= $(firstword $(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null))
NO_NVCC := no nvcc here: install the CUDA toolkit (12.4 or newer), or name it by NVCC=
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')

# ----------------------------------------------------------------------------
# Flags, each with its values

# The flags ATTN, GQA and KCONV that the user gives. If KINDS is empty, the trainer has every kind, and its options
# --attention, --query-heads and --kconv choose.
KINDS := $(filter-out undefined,$(foreach flag,ATTN GQA KCONV,$(origin $(flag))))
ATTN ?= dense
GQA ?= gqa
KCONV ?= 0

ifeq ($(origin DEVICE),undefined)
  ifeq ($(NVCC),)
    DEVICE := cpu
    DEVICE_REASON := (no nvcc here)
  else ifeq ($(filter-out 0,$(HAS_GPU)),)
    DEVICE := cpu
    DEVICE_REASON := (there is an nvcc, but no GPU answers nvidia-smi)
  else ifeq ($(PRECISION),fp64)
    DEVICE := cpu
    DEVICE_REASON := (a GPU is here, but PRECISION=fp64 is computed on the CPU only)
  else
    DEVICE := cuda
    DEVICE_REASON := (nvcc and a GPU are here)
  endif
endif

comma := ,
allow = $(if $(filter $($(1)),$(2)),,$(error $(1)=$($(1)): must be one of: $(2)$(3)))
$(call allow,DEVICE,cpu cuda simt)
$(call allow,ATTN,dense moba flashmoba)
$(call allow,GQA,gqa kdgqa dgqa pgqa)
$(call allow,KCONV,0 3 5)
ifeq ($(DEVICE),cpu)
  PRECISION ?= fp32
  $(call allow,PRECISION,fp32 fp64,$(comma) with DEVICE=cpu)
else
  PRECISION ?= bf16
  $(call allow,PRECISION,bf16 fp32,$(comma) with DEVICE=$(DEVICE))
endif
$(if $(filter cuda,$(DEVICE)),$(if $(NVCC),,$(error DEVICE=cuda: $(NO_NVCC))))

NAME := train_gpt_$(DEVICE)$(if $(KINDS),_$(ATTN)_$(GQA)_kconv$(KCONV))_$(PRECISION)
# The precision of programs that are built for the CPU with every DEVICE: tests, and the references for other devices.
CPU_PRECISION := $(if $(filter cpu,$(DEVICE)),$(PRECISION),fp32)

# ----------------------------------------------------------------------------
# Compilers. There is no -ffast-math, because it removes the checks for NaN and Inf and changes the order of sums.

WARNINGS := -Wall -Wextra -Werror -Wshadow
CFLAGS ?= -O3 -march=native -g
SHARED_FLAGS = $(CFLAGS) -fno-math-errno -fno-trapping-math -fopenmp -pthread $(WARNINGS) -I. -MMD -MP
# UNKIND=1 replaces the library's matrix product by the one of dev/cpu/gemm_unkind.h, for make test-numbers.
UNKIND ?= 0
$(call allow,UNKIND,0 1)
COMMON = -std=gnu11 -Wstrict-prototypes $(SHARED_FLAGS) $(if $(filter 1,$(UNKIND)),-DGEMM_UNKIND)
CPU = $(CC) $(COMMON) -DDEVICE_CPU
precision = -DPRECISION_$(shell echo $(1) | tr a-z A-Z)
onednn = $(if $(filter fp64,$(1)),,-ldnnl)
TRAIN_LIBS := -lcjson -lpcre2-8 -lm

# The trainer with many processes needs Open MPI, and on GPUs NCCL, if its header is beside nvcc. make MPI=0 builds for one process.
MPI ?= $(if $(shell mpicc --showme:version 2>/dev/null),1,0)
NCCL ?= $(if $(NVCC),$(if $(wildcard $(dir $(NVCC))../include/nccl.h /usr/include/nccl.h),1,0),0)
$(call allow,MPI,0 1)
ifeq ($(MPI),1)
  MPI_FLAGS := -DCOMM_MPI -D_GNU_SOURCE -DOMPI_SKIP_MPICXX $(addprefix -isystem ,$(shell mpicc --showme:incdirs))
  MPI_LIBS := $(addprefix -L,$(shell mpicc --showme:libdirs)) -lmpi
  CUDA_COMM := $(MPI_FLAGS) $(if $(filter 1,$(NCCL)),-DCOMM_NCCL)
  NCCL_LIB := $(dir $(firstword $(wildcard $(dir $(NVCC))../lib64/libnccl.so $(dir $(NVCC))../lib/libnccl.so)))
  NCCL_LIBS := $(if $(filter-out ./,$(NCCL_LIB)),-L$(NCCL_LIB) -Xlinker -rpath$(comma)$(abspath $(NCCL_LIB))) -lnccl
  CUDA_COMM_LIBS := $(MPI_LIBS) $(if $(filter 1,$(NCCL)),$(NCCL_LIBS))
  PROCESSES := many processes by MPI$(if $(filter cuda1,$(DEVICE)$(NCCL)), and NCCL)
else
  PROCESSES := a single process: $(if $(filter-out undefined default file,$(origin MPI)),MPI=0,no mpicc here (libopenmpi-dev))
endif

# The emulator of CUDA (dev/simt), plain, or with sanitizers whose flags replace CFLAGS. Its kernels access the same bytes as several
# types, as CUDA allows (-fno-strict-aliasing), and have pragmas that g++ does not know. It mostly switches between threads, which -O3
# does not make faster; full -g would take a third of the compile time.
simt = $(CXX) -std=gnu++17 $(1) -fno-math-errno -fno-trapping-math -fno-strict-aliasing -fopenmp -pthread $(WARNINGS) \
       -Wno-unknown-pragmas -DDEVICE_SIMT -I. -MMD -MP
SIMT_LEVEL := -O1
SIMT = $(call simt,$(patsubst -g,-g1,$(subst -O3,$(SIMT_LEVEL),$(CFLAGS))))
ADDRESS_FLAGS := -O1 -march=native -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined
THREAD_FLAGS := -O1 -march=native -g1 -fsanitize=thread

# Code for the GPU of this machine; or code for all of CUDA_ARCHS, and PTX of the newest, which the driver compiles for later GPUs.
CUDA_ARCHS ?= 80 90
NEWEST_ARCH := $(lastword $(CUDA_ARCHS))
OLDER_ARCHS := $(filter-out $(NEWEST_ARCH),$(CUDA_ARCHS))
with_ptx = $(foreach arch,$(1),-gencode arch=compute_$(arch),code=sm_$(arch)) -gencode arch=compute_$(NEWEST_ARCH),code=compute_$(NEWEST_ARCH)
ALL_ARCHS := $(call with_ptx,$(CUDA_ARCHS))
GPU_ARCH := $(if $(filter-out 0,$(HAS_GPU)),-arch=native,$(ALL_ARCHS))
NVCCFLAGS ?= -O3 -lineinfo
CUDA_COMMON := -std=c++17 $(NVCCFLAGS) -Werror all-warnings -I. -MMD -MP -DDEVICE_CUDA \
               $(patsubst %,-Xcompiler %,-Wall -Wextra -Werror -fopenmp -pthread)
CUDA_LIBS := -lcublasLt -Xlinker -rpath$(comma)$(abspath $(dir $(NVCC))/../lib64)

# make names a missing library before the compiler fails.
NEEDED := libpcre2-dev:pcre2.h libcjson-dev:cjson/cJSON.h
define missing_packages
$(shell for pair in $(1); do \
  printf '#define PCRE2_CODE_UNIT_WIDTH 8\n#include <stdarg.h>\n#include <stddef.h>\n#include <setjmp.h>\n#include <%s>\n' "$${pair#*:}" \
  | $(CC) -E -x c - >/dev/null 2>&1 || echo "$${pair%%:*}"; done)
endef
needs = $(if $(call missing_packages,$(1)),$(error missing: $(call missing_packages,$(1)). Run scripts/install.sh))
BUILDING := $(filter-out help clean lint format install,$(or $(MAKECMDGOALS),all))
ifneq ($(filter cpu,$(DEVICE))$(filter-out all train tokenizer retrieval,$(BUILDING)),)
  NEEDED += libdnnl-dev:oneapi/dnnl/dnnl.h
endif
ifneq ($(BUILDING),)
  $(call needs,$(NEEDED))
endif

# make V=1 shows the commands.
Q := $(if $(V),,@)

.PHONY: all train tokenizer retrieval snr scaling test test-long test-everything test-numbers mutate compile-cuda bench lint format clean help
all: train tokenizer retrieval

help:
	@sed -n 's/^#   //p' Makefile
	@echo "targets: all train tokenizer retrieval snr scaling test test-long test-everything test-numbers mutate gpu-check bench kernel-table lint format clean"

# ----------------------------------------------------------------------------
# Programs

train: $(BUILD)/$(NAME)
	@ln -sf $(NAME) $(BUILD)/train_gpt
	@echo "$(BUILD)/train_gpt -> $(NAME) $(DEVICE_REASON)"
	@echo "$(BUILD)/train_gpt runs as $(PROCESSES)"

tokenizer: $(BUILD)/tokenizer

retrieval: $(BUILD)/retrieval

# A trainer's name has its flags: train_gpt_DEVICE_PRECISION or train_gpt_DEVICE_ATTN_GQA_kconvN_PRECISION.
flag = $(word $(1),$(subst _, ,$*))
kinds = -DATTN_NAME='"$(call flag,2)"' -DGQA_NAME='"$(call flag,3)"' -DKCONV=$(patsubst kconv%,%,$(call flag,4)) -DATTENTION_MODULES=$(modules_$(call flag,2))
modules_dense := 1
modules_moba := 3
modules_flashmoba := 5
precision_of_name = $(lastword $(subst _, ,$*))
flags = $(if $(call flag,3),$(kinds)) $(call precision,$(precision_of_name)) -MF $@.d
compile_cpu = $(CPU) $(flags) $(MPI_FLAGS) -x c $< -o $@ $(call onednn,$(precision_of_name)) $(TRAIN_LIBS) $(MPI_LIBS)
compile_simt = $(SIMT) $(flags) $(MPI_FLAGS) -x c++ $< -o $@ $(TRAIN_LIBS) $(MPI_LIBS)
compile_cuda = $(NVCC) $(CUDA_COMMON) $(GPU_ARCH) $(flags) $(CUDA_COMM) $< -o $@ $(CUDA_LIBS) $(TRAIN_LIBS) $(CUDA_COMM_LIBS)

# The trainers of make test and make gpu-check: with all kinds, and one that was built with kinds of its own.
TESTED_KINDS := $(BUILD)/train_gpt_cpu_flashmoba_kdgqa_kconv3_fp32
TESTED_TRAINERS := $(BUILD)/train_gpt_cpu_fp32 $(BUILD)/train_gpt_simt_fp32 $(BUILD)/train_gpt_simt_bf16
GPU_TRAINERS := $(foreach p,fp32 bf16,$(BUILD)/train_gpt_$(DEVICE)_$(p))

$(sort $(BUILD)/$(NAME) $(TESTED_TRAINERS) $(TESTED_KINDS) $(GPU_TRAINERS)): $(BUILD)/train_gpt_%: train_gpt.cu Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(compile_$(call flag,1))

$(BUILD)/tokenizer $(BUILD)/retrieval: $(BUILD)/%: tokenizer/%.c Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CC) $(COMMON) -MF $@.d $< -o $@ -lpcre2-8 -lcjson -lm

# The router's theory.
SNR := snr_cpu_$(CPU_PRECISION)
snr: $(BUILD)/$(SNR)
	@ln -sf $(SNR) $(BUILD)/snr

$(BUILD)/$(SNR): dev/snr.c Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CPU) $(call precision,$(CPU_PRECISION)) -MF $@.d $< -o $@ $(call onednn,$(CPU_PRECISION)) $(TRAIN_LIBS)

# The calculation of how training scales to many GPUs.
scaling: $(BUILD)/scaling

$(BUILD)/scaling: dev/scaling.c Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CPU) $(call precision,fp32) -MF $@.d $< -o $@ -lm

# ----------------------------------------------------------------------------
# Tests: test, test-long, test-everything, test-numbers, mutate, gpu-check. Benchmarks: bench, kernel-table

include test/tests.mk
include dev/bench/bench.mk

# ----------------------------------------------------------------------------
# Style

SOURCES := $(shell git ls-files '*.h' '*.c' '*.cu' '*.cuh' 2>/dev/null)
SCRIPTS := $(shell git ls-files '*.sh' '*.sbatch' '.ci/run' 2>/dev/null)

lint:
	BUILD=$(BUILD) scripts/lint.sh

format:
	clang-format -i $(SOURCES)

clean:
	rm -rf $(BUILD)

-include $(wildcard $(BUILD)/*.d $(BUILD)/*/*.d)
