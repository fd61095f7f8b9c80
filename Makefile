# moba.c: every build. `make help` lists the targets.
#
#   make                                          the trainer for this machine, and the tokenizer
#   make ATTN=dense GQA=gqa KCONV=0 PRECISION=fp32 DEVICE=cpu
#
# Binaries lie side by side in build/, named by their flags; build/train_gpt is the one built last.

ifeq ($(origin CC),default)
  CC := gcc
endif
BUILD ?= build

# ----------------------------------------------------------------------------
# Flags, each with its values

ATTN ?= dense
GQA ?= gqa
KCONV ?= 0
PRECISION ?= fp32

# Only the CPU operations exist so far; with CUDA's, the choice will follow nvcc and the driver.
ifeq ($(origin DEVICE),undefined)
  DEVICE := cpu
  DEVICE_REASON := (the only device of this version)
endif

allow = $(if $(filter $($(1)),$(2)),,$(error $(1)=$($(1)): must be one of: $(2)))
$(call allow,DEVICE,cpu)
$(call allow,ATTN,dense moba flashmoba)
$(call allow,GQA,gqa kdgqa dgqa pgqa)
$(call allow,KCONV,0 3 5)
$(call allow,PRECISION,fp32 fp64)

NAME := train_gpt_$(DEVICE)_$(ATTN)_$(GQA)_kconv$(KCONV)_$(PRECISION)

# ----------------------------------------------------------------------------
# Compiler. No -ffast-math: the checks for NaN and Inf must mean something, and sums keep their order.

WARNINGS := -Wall -Wextra -Werror -Wshadow -Wstrict-prototypes
CFLAGS ?= -O3 -march=native -g
COMMON := -std=gnu11 $(CFLAGS) -fno-math-errno -fno-trapping-math -fopenmp -pthread $(WARNINGS) -I. -MMD -MP
variant = -DDEVICE_CPU -DATTN_NAME='"$(1)"' -DGQA_NAME='"$(2)"' -DKCONV=$(3)
VARIANT := $(call variant,$(ATTN),$(GQA),$(KCONV))
precision = -DPRECISION_$(shell echo $(1) | tr a-z A-Z)
onednn = $(if $(filter fp64,$(1)),,-ldnnl)
TRAIN_LIBS := -lcjson -lpcre2-8 -lm

# A missing library is named before the compiler stumbles over it.
NEEDED := libdnnl-dev:oneapi/dnnl/dnnl.h libpcre2-dev:pcre2.h libcjson-dev:cjson/cJSON.h
define missing_packages
$(shell for pair in $(1); do \
  printf '#define PCRE2_CODE_UNIT_WIDTH 8\n#include <stdarg.h>\n#include <stddef.h>\n#include <setjmp.h>\n#include <%s>\n' "$${pair#*:}" \
  | $(CC) -E -x c - >/dev/null 2>&1 || echo "$${pair%%:*}"; done)
endef
needs = $(if $(call missing_packages,$(1)),$(error missing: $(call missing_packages,$(1)). Run scripts/install.sh))
BUILDING := $(filter-out help clean lint format install,$(or $(MAKECMDGOALS),all))
ifneq ($(BUILDING),)
  $(call needs,$(NEEDED))
endif

# make V=1 shows the commands.
Q := $(if $(V),,@)

.PHONY: all train tokenizer retrieval snr test test-long compile-cuda bench lint format clean help
all: train tokenizer retrieval

help:
	@sed -n 's/^#   //p' Makefile
	@echo "targets: all train tokenizer retrieval snr test test-long bench lint format clean"

# ----------------------------------------------------------------------------
# Programs

train: $(BUILD)/$(NAME)
	@ln -sf $(NAME) $(BUILD)/train_gpt
	@echo "$(BUILD)/train_gpt -> $(NAME) $(DEVICE_REASON)"

tokenizer: $(BUILD)/tokenizer

retrieval: $(BUILD)/retrieval

# The variants that test_programs runs beside the one that is built.
TESTED_TRAINERS := $(foreach variant,kdgqa_kconv3 dgqa_kconv5 pgqa_kconv3,$(BUILD)/train_gpt_cpu_$(ATTN)_$(variant)_fp32)

# A trainer is built as its name says: train_gpt_DEVICE_ATTN_GQA_kconvN_PRECISION.
flag = $(word $(1),$(subst _, ,$*))
$(sort $(BUILD)/$(NAME) $(TESTED_TRAINERS)): $(BUILD)/train_gpt_%: train_gpt.cu Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CC) $(COMMON) $(call variant,$(call flag,2),$(call flag,3),$(patsubst kconv%,%,$(call flag,4))) \
	  $(call precision,$(call flag,5)) -MF $@.d -x c $< -o $@ $(call onednn,$(call flag,5)) $(TRAIN_LIBS)

$(BUILD)/tokenizer $(BUILD)/retrieval: $(BUILD)/%: tokenizer/%.c Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CC) $(COMMON) -MF $@.d $< -o $@ -lpcre2-8 -lcjson -lm

# The router's theory; for a checkpoint, built with the flags of the model.
snr: $(BUILD)/$(NAME:train_gpt_%=snr_%)
	@ln -sf $(NAME:train_gpt_%=snr_%) $(BUILD)/snr

$(BUILD)/$(NAME:train_gpt_%=snr_%): dev/snr.c Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CC) $(COMMON) $(VARIANT) $(call precision,$(PRECISION)) -MF $@.d $< -o $@ $(call onednn,$(PRECISION)) $(TRAIN_LIBS)

# ----------------------------------------------------------------------------
# Tests: each program in test/ is built once, or once for each precision. cmocka's closing lines tell what passed.

# The kernels, on the emulator. The compiler must not assume more of types than nvcc does, and CUDA's pragmas are not g++'s.
CXX_COMMON := -std=gnu++17 $(subst -O3,-O1,$(CFLAGS)) -fno-math-errno -fno-trapping-math -fno-strict-aliasing -fopenmp -pthread \
  $(filter-out -Wstrict-prototypes,$(WARNINGS)) -Wno-unknown-pragmas -I. -MMD -MP
KERNEL_TESTS := $(foreach precision,bf16 fp32,$(BUILD)/test/test_kernels_$(precision))

$(KERNEL_TESTS): $(BUILD)/test/test_kernels_%: test/test_kernels.cu $(BUILD)/test/reference.o Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CXX) $(CXX_COMMON) -DDEVICE_SIMT $(call precision,$*) -MF $@.d -x c++ $< -x none $(BUILD)/test/reference.o -o $@ \
	  -lcmocka -lm

# The same by nvcc, compiled and not run: for each architecture, warnings are errors.
NVCC ?= $(or $(shell command -v nvcc),/usr/local/cuda/bin/nvcc)
CUDA_ARCHITECTURES := -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=[sm_90,compute_90]
NVCC_COMMON := -std=c++17 -O3 -lineinfo $(CUDA_ARCHITECTURES) -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror -I.
CUDA_OBJECTS := $(foreach precision,bf16 fp32,$(BUILD)/cuda/test_kernels_$(precision).o)

$(CUDA_OBJECTS): $(BUILD)/cuda/test_kernels_%.o: test/test_kernels.cu Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(NVCC) $(NVCC_COMMON) $(call precision,$*) -MMD -MP -MF $@.d -c $< -o $@

compile-cuda: $(CUDA_OBJECTS)

TESTS := $(BUILD)/test/test_tokenizer $(BUILD)/test/test_dataloader $(BUILD)/test/test_runtime \
         $(BUILD)/test/test_checkpoint $(BUILD)/test/test_allocation $(BUILD)/test/test_programs \
         $(BUILD)/test/test_snr $(BUILD)/test/test_retrieval \
         $(KERNEL_TESTS) \
         $(foreach test,test_attention test_moba test_operations test_model,$(BUILD)/test/$(test)_fp64 $(BUILD)/test/$(test)_fp32)

$(BUILD)/test/%_fp64: test/%.c Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CC) $(COMMON) $(VARIANT) $(call precision,fp64) -MF $@.d $< -o $@ -lcmocka $(TRAIN_LIBS)

$(BUILD)/test/%_fp32: test/%.c Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CC) $(COMMON) $(VARIANT) $(call precision,fp32) -MF $@.d $< -o $@ -lcmocka $(call onednn,fp32) $(TRAIN_LIBS)

# The yardstick of the kernels' tests. Never under a sanitizer, which does not know OpenMP's threads; dev/cpu has tests of its own.
$(BUILD)/test/reference.o: test/reference.c Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CC) $(COMMON) -O3 -fno-sanitize=all -MF $@.d -c $< -o $@

$(BUILD)/test/%: test/%.c Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CC) $(COMMON) $(VARIANT) $(call precision,fp32) -MF $@.d $< -o $@ -lcmocka $(call onednn,fp32) $(TRAIN_LIBS)

test: all $(TESTED_TRAINERS) $(TESTS)
	@BUILD=$(BUILD) TOKENIZER=$(BUILD)/tokenizer scripts/run_tests.sh $(TESTS)

# The exhaustive matrix: the same programs under the address, undefined-behaviour and thread sanitizers, and the scripts as a
# user calls them. OpenMP's own threads are opaque to the thread sanitizer, so it sees what has threads of its own.
SANITIZED := CFLAGS="-O1 -march=native -g -fsanitize=address,undefined -fno-sanitize-recover=undefined"
THREADED := CFLAGS="-O1 -march=native -g -fsanitize=thread"
test-long: all
	@$(MAKE) --no-print-directory BUILD=$(BUILD)/address $(SANITIZED) test
	@$(MAKE) --no-print-directory BUILD=$(BUILD)/thread $(THREADED) $(BUILD)/thread/test/test_dataloader
	@scripts/run_tests.sh $(BUILD)/thread/test/test_dataloader
	@BUILD=$(BUILD) scripts/run_tests.sh test/test_scripts.sh

# ----------------------------------------------------------------------------
# Benchmarks

BENCHES := $(BUILD)/bench/attention $(BUILD)/bench/moba $(BUILD)/bench/step

$(BUILD)/bench/%: dev/bench/%.c Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CC) $(COMMON) $(VARIANT) $(call precision,fp32) -MF $@.d $< -o $@ $(call onednn,fp32) $(TRAIN_LIBS)

bench: $(BENCHES)
	GOMP_SPINCOUNT=1000 $(BUILD)/bench/attention
	GOMP_SPINCOUNT=1000 $(BUILD)/bench/moba
	GOMP_SPINCOUNT=1000 $(BUILD)/bench/step

# ----------------------------------------------------------------------------
# Style

SOURCES := $(shell git ls-files '*.h' '*.c' '*.cu' '*.cuh' 2>/dev/null)
SCRIPTS := $(shell git ls-files '*.sh' '.ci/run' 2>/dev/null)

lint:
	BUILD=$(BUILD) scripts/lint.sh

format:
	clang-format -i $(SOURCES)

clean:
	rm -rf $(BUILD)

-include $(wildcard $(BUILD)/*.d $(BUILD)/test/*.d $(BUILD)/bench/*.d $(BUILD)/cuda/*.d)
