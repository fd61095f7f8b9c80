# moba.c: every build. `make help` lists the targets.
#
#   make                                          the trainer for this machine, and the tokenizer
#   make ATTN=dense GQA=gqa KCONV=0 PRECISION=fp32 DEVICE=cpu
#   make DEVICE=cuda PRECISION=bf16               for the GPU of this machine, or for all of CUDA_ARCHS where it has none
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

NAME := train_gpt_$(DEVICE)_$(ATTN)_$(GQA)_kconv$(KCONV)_$(PRECISION)
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
names = -DATTN_NAME='"$(1)"' -DGQA_NAME='"$(2)"' -DKCONV=$(3)
VARIANT := -DDEVICE_CPU $(call names,$(ATTN),$(GQA),$(KCONV))
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

.PHONY: all train tokenizer retrieval snr scaling test test-long test-numbers mutate compile-cuda bench lint format clean help
all: train tokenizer retrieval

help:
	@sed -n 's/^#   //p' Makefile
	@echo "targets: all train tokenizer retrieval snr scaling test test-long test-numbers mutate gpu-check bench kernel-table lint format clean"

# ----------------------------------------------------------------------------
# Programs

train: $(BUILD)/$(NAME)
	@ln -sf $(NAME) $(BUILD)/train_gpt
	@echo "$(BUILD)/train_gpt -> $(NAME) $(DEVICE_REASON)"
	@echo "$(BUILD)/train_gpt runs as $(PROCESSES)"

tokenizer: $(BUILD)/tokenizer

retrieval: $(BUILD)/retrieval

# A trainer's name has its flags: train_gpt_DEVICE_ATTN_GQA_kconvN_PRECISION.
flag = $(word $(1),$(subst _, ,$*))
flags = $(call names,$(call flag,2),$(call flag,3),$(patsubst kconv%,%,$(call flag,4))) $(call precision,$(call flag,5)) -MF $@.d
compile_cpu = $(CC) $(COMMON) -DDEVICE_CPU $(flags) $(MPI_FLAGS) -x c $< -o $@ $(call onednn,$(call flag,5)) $(TRAIN_LIBS) $(MPI_LIBS)
compile_cuda = $(NVCC) $(CUDA_COMMON) $(GPU_ARCH) $(flags) $(CUDA_COMM) $< -o $@ $(CUDA_LIBS) $(TRAIN_LIBS) $(CUDA_COMM_LIBS)

# Tests run many variants. ATTN, GQA and KCONV are two strings and a number in the program. For tests, make compiles it once for each
# device and precision, and links it with these values of each variant. It always builds the emulator's programs this way, because
# only tests use them.
VARIANTS := $(BUILD)/variants
combinations = $(foreach attention,dense moba flashmoba,$(foreach heads,gqa kdgqa dgqa pgqa,$(foreach taps,0 3 5, \
                 $(VARIANTS)/train_gpt_$(1)_$(attention)_$(heads)_kconv$(taps)_$(2))))

define rules_of_variants
$(VARIANTS)/$(1)_$(2).o: train_gpt.cu Makefile
	@mkdir -p $$(@D)
	@echo "  build $$@"
	$$(Q)$(3) -include test/variant.h -DATTN_NAME=variant_attn -DGQA_NAME=variant_gqa -DKCONV=variant_kconv \
	  $$(call precision,$(2)) $$(MPI_FLAGS) -MF $$@.d -c $$< -o $$@

$(call combinations,$(1),$(2)): $(VARIANTS)/train_gpt_%: $(VARIANTS)/$(1)_$(2).o
	$$(Q)$$(link_variant)
endef
link_variant = echo 'const char variant_attn[] = "$(call flag,2)", variant_gqa[] = "$(call flag,3)"; const int variant_kconv = $(patsubst kconv%,%,$(call flag,4));' | \
  $(CXX) $(filter -fsanitize=%,$(CFLAGS)) -fopenmp -x c - -x none $< -o $@ $(call onednn,$(call flag,5)) $(TRAIN_LIBS) $(MPI_LIBS)
$(eval $(call rules_of_variants,cpu,fp32,$$(CC) $$(COMMON) -DDEVICE_CPU -x c))
$(foreach p,fp32 bf16,$(eval $(call rules_of_variants,simt,$(p),$$(SIMT) -x c++)))

# The variants of make test, which also runs the CPU trainer as a user compiles it; and all variants, which test-long runs for a few
# steps.
SIMT_VARIANTS := dense_gqa_kconv0 flashmoba_kdgqa_kconv3 flashmoba_pgqa_kconv5 dense_dgqa_kconv5 moba_gqa_kconv3
USERS_TRAINER := $(BUILD)/train_gpt_cpu_$(ATTN)_$(GQA)_kconv$(KCONV)_fp32
TESTED_VARIANTS := $(sort $(patsubst %,$(VARIANTS)/train_gpt_%,cpu_dense_gqa_kconv0_fp32 \
                     $(foreach variant,$(ATTN)_kdgqa_kconv3 $(ATTN)_dgqa_kconv5 $(ATTN)_pgqa_kconv3 $(SIMT_VARIANTS),cpu_$(variant)_fp32) \
                     $(foreach variant,$(SIMT_VARIANTS),simt_$(variant)_fp32 simt_$(variant)_bf16)))
ALL_VARIANTS := $(call combinations,cpu,fp32) $(call combinations,simt,fp32)
# The trainers that make gpu-check runs.
GPU_TRAINERS := $(foreach variant,$(SIMT_VARIANTS),$(foreach p,fp32 bf16,$(BUILD)/train_gpt_$(DEVICE)_$(variant)_$(p)))

# With LINKED=1 the user's trainer is a linked variant too, which saves a compilation.
LINKED_TRAINERS := $(patsubst $(VARIANTS)/%,$(BUILD)/%,$(call combinations,simt,fp32) $(call combinations,simt,bf16)) \
                   $(if $(filter 1,$(LINKED)),$(USERS_TRAINER))
$(LINKED_TRAINERS): $(BUILD)/%: $(VARIANTS)/%
	@ln -sf variants/$* $@

$(filter-out $(LINKED_TRAINERS),$(sort $(BUILD)/$(NAME) $(USERS_TRAINER) $(GPU_TRAINERS))): $(BUILD)/train_gpt_%: train_gpt.cu Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(compile_$(call flag,1))

$(BUILD)/tokenizer $(BUILD)/retrieval: $(BUILD)/%: tokenizer/%.c Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CC) $(COMMON) -MF $@.d $< -o $@ -lpcre2-8 -lcjson -lm

# The router's theory. For a checkpoint, build it with the flags of the model.
SNR := snr_cpu_$(ATTN)_$(GQA)_kconv$(KCONV)_$(CPU_PRECISION)
snr: $(BUILD)/$(SNR)
	@ln -sf $(SNR) $(BUILD)/snr

$(BUILD)/$(SNR): dev/snr.c Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CC) $(COMMON) $(VARIANT) $(call precision,$(CPU_PRECISION)) -MF $@.d $< -o $@ $(call onednn,$(CPU_PRECISION)) $(TRAIN_LIBS)

# The calculation of how training scales to many GPUs.
scaling: $(BUILD)/scaling

$(BUILD)/scaling: dev/scaling.c Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CC) $(COMMON) -DDEVICE_CPU $(call precision,fp32) -MF $@.d $< -o $@ -lm

# ----------------------------------------------------------------------------
# Tests of the emulator itself, and of the properties that it shares with a GPU

EMULATOR_TESTS := test_layout test_simt test_broken
EMULATOR_SANITIZED := test_broken_address test_broken_thread

$(addprefix $(BUILD)/test/,$(EMULATOR_TESTS)): $(BUILD)/test/%: test/%.cu Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(SIMT) -MF $@.d -x c++ $< -o $@ -lcmocka

$(addprefix $(BUILD)/test/,$(EMULATOR_TESTS:=_address)): $(BUILD)/test/%_address: test/%.cu Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(call simt,$(ADDRESS_FLAGS)) -MF $@.d -x c++ $< -o $@ -lcmocka

$(addprefix $(BUILD)/test/,$(EMULATOR_TESTS:=_thread)): $(BUILD)/test/%_thread: test/%.cu Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(call simt,$(THREAD_FLAGS)) -MF $@.d -x c++ $< -o $@ -lcmocka

# ----------------------------------------------------------------------------
# Tests: make builds each program in test/ once, or once for each precision. cmocka's last lines tell the result.

# make builds the tests of kernels in each precision for the emulator (build/test), for the GPU (build/gpu, which make gpu-check runs),
# and for every architecture (build/cuda). The last ones are not run, but their warnings are errors: make test compiles them for the
# newest architecture, make test-long for the others.
KERNEL_TEST_SOURCES := test_moba_kernels test_gqa test_kernels test_heads
KERNEL_TEST_NAMES := $(foreach test,$(KERNEL_TEST_SOURCES),$(test)_bf16 $(test)_fp32)
KERNEL_TESTS := $(patsubst %,$(BUILD)/test/%,$(KERNEL_TEST_NAMES))
# These tests compare the formulas of the benchmarks with the emulator's counters; a GPU has no such counters.
COUNT_TESTS := $(BUILD)/test/test_moba_counts_bf16 $(BUILD)/test/test_moba_counts_fp32
GPU_TESTS := $(patsubst %,$(BUILD)/gpu/%,test_layout $(KERNEL_TEST_NAMES))
CUDA_OBJECTS := $(patsubst %,$(BUILD)/cuda/%.o,train_gpt_bf16 test_layout $(KERNEL_TEST_NAMES))
CUDA_OBJECTS_LONG := $(if $(NVCC),$(BUILD)/cuda/train_gpt_fp32.o $(foreach arch,$(OLDER_ARCHS), \
                       $(patsubst %,$(BUILD)/cuda/%.sm_$(arch).cubin,train_gpt_bf16 test_layout $(KERNEL_TEST_NAMES))))

# Nothing runs these objects, so their host code is not optimized.
NEWEST_OBJECT := -c $(call with_ptx,$(NEWEST_ARCH)) -Xcompiler -O0

# The output of ptxas on registers and shared memory is kept beside the object, for make kernel-table. In bf16 a register spill is
# an error; not in fp32, whose kernels are only for checking.
PTXAS_FLAGS = -Xptxas -v$(if $(findstring bf16,$@),$(comma)--warn-on-spills$(comma)--warning-as-error)
compile_object = $(NVCC) $(CUDA_COMMON) $(1) $(PTXAS_FLAGS) -MF $@.d $< -o $@ 2>$@.ptxas || \
  { grep -vE '^(ptxas info| +[0-9]+ bytes stack)' $@.ptxas >&2; exit 1; }

define rules_of_kernel_test
$(BUILD)/test/$(1)_bf16 $(BUILD)/test/$(1)_fp32: $(BUILD)/test/$(1)_%: test/$(1).cu $(BUILD)/test/reference.o Makefile
	@mkdir -p $$(@D)
	@echo "  build $$@"
	$$(Q)$$(SIMT) $$(call precision,$$*) -MF $$@.d -x c++ $$< -x none $(BUILD)/test/reference.o -o $$@ -lcmocka -lm

$(BUILD)/gpu/$(1)_bf16 $(BUILD)/gpu/$(1)_fp32: $(BUILD)/gpu/$(1)_%: test/$(1).cu $(BUILD)/test/reference.o Makefile
	@mkdir -p $$(@D)
	@echo "  build $$@"
	$$(Q)$$(NVCC) $$(CUDA_COMMON) $$(GPU_ARCH) $$(call precision,$$*) -MF $$@.d $$< $(BUILD)/test/reference.o -o $$@ $$(CUDA_LIBS) -lcmocka -lm

$(BUILD)/cuda/$(1)_bf16.o $(BUILD)/cuda/$(1)_fp32.o: $(BUILD)/cuda/$(1)_%.o: test/$(1).cu Makefile
	@mkdir -p $$(@D)
	@echo "  build $$@"
	$$(Q)$$(call compile_object,$$(NEWEST_OBJECT) $$(call precision,$$*))
endef
$(foreach test,$(KERNEL_TEST_SOURCES),$(eval $(call rules_of_kernel_test,$(test))))
# This test runs for minutes in make test-long. -O2 saves a seventh of that, which is more than the longer compilation.
$(BUILD)/test/test_moba_kernels_bf16 $(BUILD)/test/test_moba_kernels_fp32: SIMT_LEVEL := -O2

$(COUNT_TESTS): $(BUILD)/test/test_moba_counts_%: test/test_moba_counts.cu Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(SIMT) $(call precision,$*) -MF $@.d -x c++ $< -o $@ -lcmocka -lm

$(BUILD)/gpu/test_layout: test/test_layout.cu Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(NVCC) $(CUDA_COMMON) $(GPU_ARCH) -MF $@.d $< -o $@ -lcmocka

$(BUILD)/cuda/test_layout.o: test/test_layout.cu Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(call compile_object,$(NEWEST_OBJECT))

define rules_of_older_arch
$(patsubst %,$(BUILD)/cuda/%_bf16.sm_$(1).cubin,$(KERNEL_TEST_SOURCES)): $(BUILD)/cuda/%_bf16.sm_$(1).cubin: test/%.cu Makefile
	@mkdir -p $$(@D)
	@echo "  build $$@"
	$$(Q)$$(call compile_object,-cubin -arch=sm_$(1) $$(call precision,bf16))

$(patsubst %,$(BUILD)/cuda/%_fp32.sm_$(1).cubin,$(KERNEL_TEST_SOURCES)): $(BUILD)/cuda/%_fp32.sm_$(1).cubin: test/%.cu Makefile
	@mkdir -p $$(@D)
	@echo "  build $$@"
	$$(Q)$$(call compile_object,-cubin -arch=sm_$(1) $$(call precision,fp32))

$(BUILD)/cuda/test_layout.sm_$(1).cubin: test/test_layout.cu Makefile
	@mkdir -p $$(@D)
	@echo "  build $$@"
	$$(Q)$$(call compile_object,-cubin -arch=sm_$(1))

$(BUILD)/cuda/train_gpt_bf16.sm_$(1).cubin: train_gpt.cu Makefile
	@mkdir -p $$(@D)
	@echo "  build $$@"
	$$(Q)$$(call compile_object,-cubin -arch=sm_$(1) $$(call names,dense,gqa,0) $$(call precision,bf16) $$(CUDA_COMM))
endef
$(foreach arch,$(OLDER_ARCHS),$(eval $(call rules_of_older_arch,$(arch))))

$(BUILD)/cuda/train_gpt_bf16.o $(BUILD)/cuda/train_gpt_fp32.o: $(BUILD)/cuda/train_gpt_%.o: train_gpt.cu Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(call compile_object,$(NEWEST_OBJECT) $(call names,dense,gqa,0) $(call precision,$*) $(CUDA_COMM))

.PHONY: compile-cuda
ifeq ($(NVCC),)
compile-cuda:
	@echo "SKIPPED: nothing was compiled for GPUs: $(NO_NVCC)"
else
compile-cuda: $(CUDA_OBJECTS)
endif

# The longest tests first, so that the last ones end together.
TESTS := $(BUILD)/test/test_simt_trainer $(BUILD)/test/test_distributed $(BUILD)/test/test_programs test/test_launch.sh \
         $(BUILD)/test/test_tokenizer $(BUILD)/test/test_dataloader $(BUILD)/test/test_runtime \
         $(BUILD)/test/test_checkpoint $(BUILD)/test/test_allocation $(BUILD)/test/test_snr $(BUILD)/test/test_scaling \
         $(BUILD)/test/test_retrieval \
         $(KERNEL_TESTS) $(COUNT_TESTS) $(addprefix $(BUILD)/test/,$(EMULATOR_TESTS) $(EMULATOR_SANITIZED)) \
         $(foreach test,test_attention test_moba test_operations test_model,$(BUILD)/test/$(test)_fp64 $(BUILD)/test/$(test)_fp32)

$(BUILD)/test/%_fp64: test/%.c Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CC) $(COMMON) $(VARIANT) $(call precision,fp64) -MF $@.d $< -o $@ -lcmocka $(TRAIN_LIBS)

$(BUILD)/test/%_fp32: test/%.c Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CC) $(COMMON) $(VARIANT) $(call precision,fp32) -MF $@.d $< -o $@ -lcmocka $(call onednn,fp32) $(TRAIN_LIBS)

# The reference of the kernels' tests. It has no sanitizer, because the thread sanitizer does not know OpenMP's barriers; dev/cpu has
# its own tests.
$(BUILD)/test/reference.o: test/reference.c Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CC) $(COMMON) -O3 -fno-sanitize=all -MF $@.d -c $< -o $@

$(BUILD)/test/%: test/%.c Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CC) $(COMMON) $(VARIANT) $(call precision,fp32) -MF $@.d $< -o $@ -lcmocka $(call onednn,fp32) $(TRAIN_LIBS)

# Tests of docs/math.md section 6: with gemm_unkind, and with oneDNN limited to the instructions of older processors. The unkind build
# uses the emulator's trainers of $(BUILD), which do not call gemm of dev/cpu.
UNKIND_BUILD := $(BUILD)/unkind
OPERATION_TESTS := test/test_model_fp32 test/test_moba_fp32 test/test_attention_fp32 test/test_operations_fp32
PROGRAM_TESTS := test/test_simt_trainer test/test_distributed test/test_programs test/test_checkpoint test/test_retrieval
UNKIND_SAMPLE := $(addprefix $(UNKIND_BUILD)/,test/test_model_fp32 test/test_moba_fp32)
SIMT_TRAINERS := $(filter $(VARIANTS)/train_gpt_simt_%,$(TESTED_VARIANTS))
.PHONY: unkind-operations unkind-programs
unkind-operations:
	@$(MAKE) --no-print-directory BUILD=$(UNKIND_BUILD) UNKIND=1 $(addprefix $(UNKIND_BUILD)/,$(OPERATION_TESTS))
unkind-programs: unkind-operations $(SIMT_TRAINERS) $(BUILD)/tokenizer $(BUILD)/retrieval
	@mkdir -p $(UNKIND_BUILD)/variants
	@for program in $(SIMT_TRAINERS:$(BUILD)/%=%) tokenizer retrieval; do \
	  ln -sf "$$(realpath $(BUILD)/$$program)" $(UNKIND_BUILD)/$$program; done
	@$(MAKE) --no-print-directory BUILD=$(UNKIND_BUILD) UNKIND=1 LINKED=1 $(addprefix $(UNKIND_BUILD)/,$(PROGRAM_TESTS)) \
	  $(patsubst $(BUILD)/%,$(UNKIND_BUILD)/%,$(filter-out $(SIMT_TRAINERS),$(TESTED_VARIANTS)) $(USERS_TRAINER))
	@ln -sf $(notdir $(USERS_TRAINER)) $(UNKIND_BUILD)/train_gpt

unkind = $(call with,GEMM_SEED=$(1) OMP_NUM_THREADS=$(2) BUILD=$(UNKIND_BUILD) TOKENIZER=$(UNKIND_BUILD)/tokenizer,$(addprefix $(UNKIND_BUILD)/,$(3)))
limited = $(call with,ONEDNN_MAX_CPU_ISA=$(1) OMP_NUM_THREADS=$(2) BUILD=$(BUILD) TOKENIZER=$(BUILD)/tokenizer,$(addprefix $(BUILD)/,$(3)))
# make test-long runs every seed and every instruction set once, each with another number of threads; make test-numbers runs all
# combinations.
NUMBER_TESTS = $(call unkind,1,1,$(PROGRAM_TESTS)) $(call limited,SSE41,2,$(PROGRAM_TESTS)) \
               $(call unkind,1,4,$(OPERATION_TESTS)) $(call unkind,2,1,$(OPERATION_TESTS)) $(call unkind,3,2,$(OPERATION_TESTS)) \
               $(call limited,SSE41,1,$(OPERATION_TESTS)) $(call limited,AVX,2,$(OPERATION_TESTS)) $(call limited,AVX2,4,$(OPERATION_TESTS))
test-numbers: unkind-programs $(USERS_TRAINER) $(TESTED_VARIANTS) $(addprefix $(BUILD)/,$(OPERATION_TESTS) $(PROGRAM_TESTS))
	@$(RUN_TESTS) $(foreach threads,1 2 4,$(foreach seed,1 2 3,$(call unkind,$(seed),$(threads),$(OPERATION_TESTS) $(PROGRAM_TESTS))) \
	  $(foreach set,SSE41 AVX AVX2 DEFAULT,$(call limited,$(set),$(threads),$(OPERATION_TESTS) $(PROGRAM_TESTS))))

# Most tests have one thread, so make runs as many at a time as there are cores. It runs at most 4, because the threads of some tests
# would slow the others down.
RUN_TESTS := MAKEFLAGS= TEST_JOBS=$(shell n=$$(nproc); echo $$((n < 4 ? n : 4))) scripts/run_tests.sh

test: all compile-cuda unkind-operations $(USERS_TRAINER) $(TESTED_VARIANTS) $(TESTS)
	@BUILD=$(BUILD) TOKENIZER=$(BUILD)/tokenizer $(RUN_TESTS) $(TESTS) $(UNKIND_SAMPLE)
	@$(if $(NVCC),:,echo "SKIPPED: nothing was compiled for GPUs: $(NO_NVCC)")

# The full matrix: the same programs under the address, undefined-behaviour and thread sanitizers, kernels and emulator in other
# orders of the threads, every variant, every architecture, and the scripts as a user calls them. It leaves out the runs of make
# test. make first builds everything, then runs one list, the longest first, so that no core is idle.
ADDRESS := $(BUILD)/address
THREAD := $(BUILD)/thread
.PHONY: test-programs address-programs thread-programs
test-programs: $(BUILD)/tokenizer $(BUILD)/retrieval $(USERS_TRAINER) $(TESTED_VARIANTS) $(filter-out %.sh,$(TESTS))
	@ln -sf $(notdir $(USERS_TRAINER)) $(BUILD)/train_gpt
address-programs:
	@$(MAKE) --no-print-directory BUILD=$(ADDRESS) CFLAGS="$(ADDRESS_FLAGS)" LINKED=1 EMULATOR_SANITIZED= test-programs
# The thread sanitizer knows every thread of the emulator but not OpenMP's barriers, so the reference runs with one thread.
THREAD_TESTS := $(addprefix $(THREAD)/test/,test_moba_kernels_bf16 test_gqa_bf16 test_kernels_bf16 test_layout test_simt test_dataloader)
thread-programs:
	@$(MAKE) --no-print-directory BUILD=$(THREAD) CFLAGS="$(THREAD_FLAGS)" $(THREAD_TESTS)

ORDERED := $(KERNEL_TESTS) $(addprefix $(BUILD)/test/,$(EMULATOR_TESTS) test_broken_thread)
with = $(foreach program,$(2),'$(1) $(program)')
ADDRESS_TESTS := $(patsubst $(BUILD)/%,$(ADDRESS)/%,$(filter-out $(EMULATOR_SANITIZED:%=$(BUILD)/test/%),$(TESTS)))
LONG_TESTS = '$(MUTATE) --sample 30' \
             $(call with,BUILD=$(BUILD) TEST_LONG=rest,$(BUILD)/test/test_simt_trainer) \
             $(call with,SIMT_ORDER=reverse SIMT_ASYNC=eager TEST_LONG=1,$(ORDERED)) \
             $(call with,BUILD=$(ADDRESS) TOKENIZER=$(ADDRESS)/tokenizer,$(ADDRESS_TESTS)) \
             $(call with,OMP_NUM_THREADS=1,$(THREAD_TESTS)) \
             $(call with,BUILD=$(BUILD),test/test_scripts.sh) \
             $(NUMBER_TESTS) \
             $(call with,BUILD=$(BUILD) TEST_LONG=rest,$(BUILD)/test/test_distributed test/test_launch.sh) \
             $(foreach seed,2 3,$(call with,SIMT_ORDER=random SIMT_ASYNC=mixed SIMT_SEED=$(seed),$(ORDERED)))
test-long: all $(CUDA_OBJECTS_LONG) $(ORDERED) $(ALL_VARIANTS) $(TESTED_VARIANTS) $(USERS_TRAINER) address-programs thread-programs unkind-programs \
           $(BUILD)/test/test_simt_trainer $(BUILD)/test/test_distributed
	@$(RUN_TESTS) $(LONG_TESTS)

# dev/simt/mutate.py breaks the kernels on purpose, one place at a time, and checks that the tests fail. test-long takes a sample.
MUTATE := CXX=$(CXX) MAKE=$(MAKE) dev/simt/mutate.py --build $(BUILD)/mutate
mutate:
	$(MUTATE) --report docs/results/mutation.md

# ----------------------------------------------------------------------------
# Benchmarks for the CPU; and NAME_DEVICE_PRECISION for a GPU, or for the emulator, which only shows that they work

BENCHES := $(BUILD)/bench/attention $(BUILD)/bench/moba $(BUILD)/bench/step

$(BENCHES): $(BUILD)/bench/%: dev/bench/%.c Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CC) $(COMMON) $(VARIANT) $(call precision,fp32) -MF $@.d $< -o $@ $(call onednn,fp32) $(TRAIN_LIBS)

GPU_BENCHES := $(foreach name,attention moba step,$(foreach device,simt cuda,$(foreach p,bf16 fp32,$(BUILD)/bench/$(name)_$(device)_$(p))))
bench_flags = $(call names,dense,gqa,0) $(call precision,$(call flag,3)) -MF $@.d
bench_simt = $(SIMT) $(bench_flags) -x c++ $< -o $@ $(TRAIN_LIBS)
bench_cuda = $(NVCC) $(CUDA_COMMON) $(GPU_ARCH) $(bench_flags) -x cu $< -o $@ $(CUDA_LIBS) $(TRAIN_LIBS)
$(filter $(BUILD)/bench/step%,$(GPU_BENCHES)): $(BUILD)/bench/%: dev/bench/step.c Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(bench_$(call flag,2))

$(filter $(BUILD)/bench/attention%,$(GPU_BENCHES)): $(BUILD)/bench/%: dev/bench/attention.cu Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(bench_$(call flag,2))

$(filter $(BUILD)/bench/moba_%,$(GPU_BENCHES)): $(BUILD)/bench/%: dev/bench/moba.cu Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(bench_$(call flag,2))

ifeq ($(DEVICE),cpu)
bench: $(BENCHES)
	GOMP_SPINCOUNT=1000 $(BUILD)/bench/attention
	GOMP_SPINCOUNT=1000 $(BUILD)/bench/moba
	GOMP_SPINCOUNT=1000 $(BUILD)/bench/step
else
bench: $(foreach name,attention moba step,$(BUILD)/bench/$(name)_$(DEVICE)_$(PRECISION))
	$(BUILD)/bench/attention_$(DEVICE)_$(PRECISION)
	$(BUILD)/bench/moba_$(DEVICE)_$(PRECISION)
	$(BUILD)/bench/step_$(DEVICE)_$(PRECISION) --batch 32
	$(BUILD)/bench/step_$(DEVICE)_$(PRECISION) --batch 4 --sequence-length 8192
endif

# ----------------------------------------------------------------------------
# docs/results/kernels.md: registers and shared memory from ptxas, shared memory of launches from the emulator, counts by formula.

TABLED := $(KERNEL_TEST_SOURCES:=_bf16)
PTXAS_TOLD := $(foreach kind,$(OLDER_ARCHS:%=sm_%.cubin) o,$(TABLED:%=$(BUILD)/cuda/%.$(kind).ptxas))
.PHONY: kernel-table
kernel-table: $(PTXAS_TOLD:%.ptxas=%) $(TABLED:%=$(BUILD)/test/%) $(BUILD)/bench/moba_simt_bf16
	@rm -f $(BUILD)/launches.txt
	@for test in $(TABLED); do SIMT_LAUNCHES=$(BUILD)/launches.txt $(BUILD)/test/$$test >/dev/null 2>&1 || exit 1; done
	@for draw in uniform recent sink oldest; do \
	  $(BUILD)/bench/moba_simt_bf16 --count --select $$draw --json $(BUILD)/counts_$$draw.json >/dev/null || exit 1; done
	@$(BUILD)/bench/moba_simt_bf16 --count --workspace 4096 --json $(BUILD)/counts_4096.json >/dev/null
	dev/bench/kernel_table.py --nvcc "$(NVCC)" --ptxas $(PTXAS_TOLD) --launches $(BUILD)/launches.txt \
	  --counts $(foreach draw,uniform recent sink oldest,$(BUILD)/counts_$(draw).json) \
	  --roomy $(BUILD)/counts_4096.json --ladder docs/results/kernels.md >$(BUILD)/kernels.md
	mv $(BUILD)/kernels.md docs/results/kernels.md

# ----------------------------------------------------------------------------
# make gpu-check: all checks that need a GPU, in one command. Its script calls the two targets after it.

DEVICE_TESTS := $(if $(filter simt,$(DEVICE)),$(KERNEL_TESTS),$(GPU_TESTS))

.PHONY: gpu-check gpu-check-programs gpu-check-tests
gpu-check:
	@BUILD=$(BUILD) NVCC=$(NVCC) scripts/gpu_check.sh

gpu-check-programs: $(BUILD)/tokenizer $(filter $(VARIANTS)/train_gpt_cpu_%,$(TESTED_VARIANTS)) $(GPU_TRAINERS) $(DEVICE_TESTS) \
                    $(BUILD)/test/test_simt_trainer $(foreach name,attention moba step,$(BUILD)/bench/$(name)_$(DEVICE)_bf16)

gpu-check-tests:
	@echo $(DEVICE_TESTS)

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
