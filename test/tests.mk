# Rules of the tests. The Makefile at the top of the tree includes this file, and runs all commands there.

# ----------------------------------------------------------------------------
# Tests of the emulator itself, and of the properties that it shares with a GPU

EMULATOR_TESTS := test_layout test_simt test_broken
EMULATOR_SANITIZED := test_broken_address test_broken_thread

$(addprefix $(BUILD)/test/,$(EMULATOR_TESTS)): $(BUILD)/test/%: test/%.cu Makefile test/tests.mk
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(SIMT) -MF $@.d -x c++ $< -o $@ -lcmocka

$(addprefix $(BUILD)/test/,$(EMULATOR_TESTS:=_address)): $(BUILD)/test/%_address: test/%.cu Makefile test/tests.mk
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(call simt,$(ADDRESS_FLAGS)) -MF $@.d -x c++ $< -o $@ -lcmocka

$(addprefix $(BUILD)/test/,$(EMULATOR_TESTS:=_thread)): $(BUILD)/test/%_thread: test/%.cu Makefile test/tests.mk
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(call simt,$(THREAD_FLAGS)) -MF $@.d -x c++ $< -o $@ -lcmocka

# ----------------------------------------------------------------------------
# make builds each test program in test/ once, or once for each precision. The last lines of
# a cmocka program give its result.

# make builds the tests of kernels in each precision: for the emulator (build/test), for the GPU (build/gpu, which
# make gpu-check runs), and for every architecture (build/cuda). make only compiles the last ones, with warnings as
# errors: make test for the newest architecture, make test-long for the others.
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

# For make kernel-table, make stores ptxas's report of registers and shared memory beside the object. In bf16 a
# register spill is an error. In fp32 it is not, because fp32 kernels only check the others.
PTXAS_FLAGS = -Xptxas -v$(if $(findstring bf16,$@),$(comma)--warn-on-spills$(comma)--warning-as-error)
compile_object = $(NVCC) $(CUDA_COMMON) $(1) $(PTXAS_FLAGS) -MF $@.d $< -o $@ 2>$@.ptxas || \
  { grep -vE '^(ptxas info| +[0-9]+ bytes stack)' $@.ptxas >&2; exit 1; }

define rules_of_kernel_test
$(BUILD)/test/$(1)_bf16 $(BUILD)/test/$(1)_fp32: $(BUILD)/test/$(1)_%: test/$(1).cu $(BUILD)/test/reference.o Makefile test/tests.mk
	@mkdir -p $$(@D)
	@echo "  build $$@"
	$$(Q)$$(SIMT) $$(call precision,$$*) -MF $$@.d -x c++ $$< -x none $(BUILD)/test/reference.o -o $$@ -lcmocka -lm

$(BUILD)/gpu/$(1)_bf16 $(BUILD)/gpu/$(1)_fp32: $(BUILD)/gpu/$(1)_%: test/$(1).cu $(BUILD)/test/reference.o Makefile test/tests.mk
	@mkdir -p $$(@D)
	@echo "  build $$@"
	$$(Q)$$(NVCC) $$(CUDA_COMMON) $$(GPU_ARCH) $$(call precision,$$*) -MF $$@.d $$< $(BUILD)/test/reference.o -o $$@ $$(CUDA_LIBS) -lcmocka -lm

$(BUILD)/cuda/$(1)_bf16.o $(BUILD)/cuda/$(1)_fp32.o: $(BUILD)/cuda/$(1)_%.o: test/$(1).cu Makefile test/tests.mk
	@mkdir -p $$(@D)
	@echo "  build $$@"
	$$(Q)$$(call compile_object,$$(NEWEST_OBJECT) $$(call precision,$$*))
endef
$(foreach test,$(KERNEL_TEST_SOURCES),$(eval $(call rules_of_kernel_test,$(test))))
# make test-long runs this test for minutes. -O2 saves a seventh of them, more than its longer compilation costs.
$(BUILD)/test/test_moba_kernels_bf16 $(BUILD)/test/test_moba_kernels_fp32: SIMT_LEVEL := -O2

$(COUNT_TESTS): $(BUILD)/test/test_moba_counts_%: test/test_moba_counts.cu Makefile test/tests.mk
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(SIMT) $(call precision,$*) -MF $@.d -x c++ $< -o $@ -lcmocka -lm

$(BUILD)/gpu/test_layout: test/test_layout.cu Makefile test/tests.mk
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(NVCC) $(CUDA_COMMON) $(GPU_ARCH) -MF $@.d $< -o $@ -lcmocka

$(BUILD)/cuda/test_layout.o: test/test_layout.cu Makefile test/tests.mk
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(call compile_object,$(NEWEST_OBJECT))

define rules_of_older_arch
$(patsubst %,$(BUILD)/cuda/%_bf16.sm_$(1).cubin,$(KERNEL_TEST_SOURCES)): $(BUILD)/cuda/%_bf16.sm_$(1).cubin: test/%.cu Makefile test/tests.mk
	@mkdir -p $$(@D)
	@echo "  build $$@"
	$$(Q)$$(call compile_object,-cubin -arch=sm_$(1) $$(call precision,bf16))

$(patsubst %,$(BUILD)/cuda/%_fp32.sm_$(1).cubin,$(KERNEL_TEST_SOURCES)): $(BUILD)/cuda/%_fp32.sm_$(1).cubin: test/%.cu Makefile test/tests.mk
	@mkdir -p $$(@D)
	@echo "  build $$@"
	$$(Q)$$(call compile_object,-cubin -arch=sm_$(1) $$(call precision,fp32))

$(BUILD)/cuda/test_layout.sm_$(1).cubin: test/test_layout.cu Makefile test/tests.mk
	@mkdir -p $$(@D)
	@echo "  build $$@"
	$$(Q)$$(call compile_object,-cubin -arch=sm_$(1))

$(BUILD)/cuda/train_gpt_bf16.sm_$(1).cubin: train_gpt.cu Makefile test/tests.mk
	@mkdir -p $$(@D)
	@echo "  build $$@"
	$$(Q)$$(call compile_object,-cubin -arch=sm_$(1) $$(call precision,bf16) $$(CUDA_COMM))
endef
$(foreach arch,$(OLDER_ARCHS),$(eval $(call rules_of_older_arch,$(arch))))

$(BUILD)/cuda/train_gpt_bf16.o $(BUILD)/cuda/train_gpt_fp32.o: $(BUILD)/cuda/train_gpt_%.o: train_gpt.cu Makefile test/tests.mk
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(call compile_object,$(NEWEST_OBJECT) $(call precision,$*) $(CUDA_COMM))

.PHONY: compile-cuda
ifeq ($(NVCC),)
compile-cuda:
	@echo "SKIPPED: nothing was compiled for GPUs: $(NO_NVCC)"
else
compile-cuda: $(CUDA_OBJECTS)
endif

# The longest tests come first, so that the last tests end at about the same time.
TESTS := $(BUILD)/test/test_simt_trainer $(BUILD)/test/test_distributed $(BUILD)/test/test_programs test/test_launch.sh \
         $(BUILD)/test/test_tokenizer $(BUILD)/test/test_dataloader $(BUILD)/test/test_runtime \
         $(BUILD)/test/test_checkpoint $(BUILD)/test/test_allocation $(BUILD)/test/test_snr $(BUILD)/test/test_scaling \
         $(BUILD)/test/test_retrieval \
         $(KERNEL_TESTS) $(COUNT_TESTS) $(addprefix $(BUILD)/test/,$(EMULATOR_TESTS) $(EMULATOR_SANITIZED)) \
         $(foreach test,test_attention test_moba test_operations test_model,$(BUILD)/test/$(test)_fp64 $(BUILD)/test/$(test)_fp32)

$(BUILD)/test/%_fp64: test/%.c Makefile test/tests.mk
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CPU) $(call precision,fp64) -MF $@.d $< -o $@ -lcmocka $(TRAIN_LIBS)

$(BUILD)/test/%_fp32: test/%.c Makefile test/tests.mk
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CPU) $(call precision,fp32) -MF $@.d $< -o $@ -lcmocka $(call onednn,fp32) $(TRAIN_LIBS)

# The reference of the kernels' tests. It has no sanitizer, because the thread sanitizer does not know the
# barriers of OpenMP. dev/cpu has its own tests.
$(BUILD)/test/reference.o: test/reference.c Makefile test/tests.mk
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CC) $(COMMON) -O3 -fno-sanitize=all -MF $@.d -c $< -o $@

$(BUILD)/test/%: test/%.c Makefile test/tests.mk
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CPU) $(call precision,fp32) -MF $@.d $< -o $@ -lcmocka $(call onednn,fp32) $(TRAIN_LIBS)

# Tests of docs/math.md section 6. One group uses gemm_unkind. The other limits oneDNN to the instructions of older
# processors. The unkind build takes the emulator's trainers from $(BUILD), because they do not call gemm of dev/cpu.
UNKIND_BUILD := $(BUILD)/unkind
OPERATION_TESTS := test/test_model_fp32 test/test_moba_fp32 test/test_attention_fp32 test/test_operations_fp32
PROGRAM_TESTS := test/test_simt_trainer test/test_distributed test/test_programs test/test_checkpoint test/test_retrieval
UNKIND_SAMPLE := $(addprefix $(UNKIND_BUILD)/,test/test_model_fp32 test/test_moba_fp32)
SIMT_TRAINERS := $(filter $(BUILD)/train_gpt_simt_%,$(TESTED_TRAINERS))
.PHONY: unkind-operations unkind-programs
unkind-operations:
	@$(MAKE) --no-print-directory BUILD=$(UNKIND_BUILD) UNKIND=1 $(addprefix $(UNKIND_BUILD)/,$(OPERATION_TESTS))
unkind-programs: unkind-operations $(SIMT_TRAINERS) $(BUILD)/tokenizer $(BUILD)/retrieval
	@for program in $(SIMT_TRAINERS:$(BUILD)/%=%) tokenizer retrieval; do \
	  ln -sf "$$(realpath $(BUILD)/$$program)" $(UNKIND_BUILD)/$$program; done
	@$(MAKE) --no-print-directory BUILD=$(UNKIND_BUILD) UNKIND=1 $(addprefix $(UNKIND_BUILD)/,$(PROGRAM_TESTS)) \
	  $(patsubst $(BUILD)/%,$(UNKIND_BUILD)/%,$(BUILD)/train_gpt_cpu_fp32 $(TESTED_KINDS))
	@ln -sf train_gpt_cpu_fp32 $(UNKIND_BUILD)/train_gpt

unkind = $(call with,GEMM_SEED=$(1) OMP_NUM_THREADS=$(2) BUILD=$(UNKIND_BUILD) TOKENIZER=$(UNKIND_BUILD)/tokenizer,$(addprefix $(UNKIND_BUILD)/,$(3)))
limited = $(call with,ONEDNN_MAX_CPU_ISA=$(1) OMP_NUM_THREADS=$(2) BUILD=$(BUILD) TOKENIZER=$(BUILD)/tokenizer,$(addprefix $(BUILD)/,$(3)))
# make test-long runs every seed and every instruction set, each for some tests and with another number of threads.
# make test-numbers runs all combinations.
NUMBER_TESTS = $(call unkind,1,1,test/test_checkpoint) \
               $(call limited,SSE41,2,test/test_distributed test/test_programs test/test_checkpoint test/test_retrieval) \
               $(call unkind,2,4,test/test_model_fp32 test/test_moba_fp32) $(call unkind,3,2,test/test_attention_fp32 test/test_operations_fp32) \
               $(call limited,SSE41,1,$(OPERATION_TESTS)) $(call limited,AVX,2,test/test_model_fp32) $(call limited,AVX2,4,test/test_moba_fp32)
ALL_NUMBER_TESTS = $(foreach threads,1 2 4, \
                     $(foreach seed,1 2 3,$(call unkind,$(seed),$(threads),$(OPERATION_TESTS) $(PROGRAM_TESTS))) \
                     $(foreach set,SSE41 AVX AVX2 DEFAULT,$(call limited,$(set),$(threads),$(OPERATION_TESTS) $(PROGRAM_TESTS))))
test-numbers: unkind-programs $(TESTED_TRAINERS) $(TESTED_KINDS) $(addprefix $(BUILD)/,$(OPERATION_TESTS) $(PROGRAM_TESTS))
	@$(RUN_TESTS) $(ALL_NUMBER_TESTS)

# Most tests have one thread, so as many run at a time as there are cores. The limit is 4, because some tests have
# several threads and would slow the others down.
RUN_TESTS := MAKEFLAGS= TEST_JOBS=$(shell n=$$(nproc); echo $$((n < 4 ? n : 4))) scripts/run_tests.sh

test: all compile-cuda unkind-operations $(TESTED_TRAINERS) $(TESTED_KINDS) $(TESTS)
	@BUILD=$(BUILD) TOKENIZER=$(BUILD)/tokenizer $(RUN_TESTS) $(TESTS) $(UNKIND_SAMPLE)
	@$(if $(NVCC),:,echo "SKIPPED: nothing was compiled for GPUs: $(NO_NVCC)")

# make test-long adds to make test: the address, undefined-behaviour and thread sanitizers, other orders of the
# emulator's threads, other libraries' rounding, every architecture, the scripts as a user calls them, and a sample of
# mutants. make test-everything adds the same for all programs and all variants. make first builds everything, then
# runs one list, the longest tests first, so that no core is idle.
ADDRESS := $(BUILD)/address
THREAD := $(BUILD)/thread
with = $(foreach program,$(2),'$(1) $(program)')
with_address = $(call with,BUILD=$(ADDRESS) TOKENIZER=$(ADDRESS)/tokenizer,$(addprefix $(ADDRESS)/,$(1)))
ADDRESS_TESTS := test/test_programs test/test_tokenizer test/test_runtime test/test_checkpoint test/test_dataloader test/test_retrieval \
                 test/test_allocation $(KERNEL_TESTS:$(BUILD)/%=%) $(addprefix test/,$(EMULATOR_TESTS)) $(OPERATION_TESTS)
MORE_ADDRESS_TESTS := test/test_simt_trainer test/test_distributed test/test_snr test/test_scaling $(COUNT_TESTS:$(BUILD)/%=%) \
                      $(OPERATION_TESTS:_fp32=_fp64)
.PHONY: address-programs more-address-programs thread-programs
address-programs:
	@$(MAKE) --no-print-directory BUILD=$(ADDRESS) CFLAGS="$(ADDRESS_FLAGS)" $(addprefix $(ADDRESS)/,tokenizer retrieval \
	  train_gpt_cpu_fp32 $(notdir $(TESTED_KINDS)) $(ADDRESS_TESTS))
	@ln -sf train_gpt_cpu_fp32 $(ADDRESS)/train_gpt
more-address-programs: address-programs
	@$(MAKE) --no-print-directory BUILD=$(ADDRESS) CFLAGS="$(ADDRESS_FLAGS)" $(addprefix $(ADDRESS)/,$(notdir $(TESTED_TRAINERS)) $(MORE_ADDRESS_TESTS))
# The thread sanitizer knows the emulator's threads but not OpenMP's barriers, so the reference runs with one thread.
THREAD_TESTS := $(addprefix $(THREAD)/test/,test_moba_kernels_bf16 test_gqa_bf16 test_kernels_bf16 test_layout test_simt test_dataloader)
thread-programs:
	@$(MAKE) --no-print-directory BUILD=$(THREAD) CFLAGS="$(THREAD_FLAGS)" $(THREAD_TESTS)

ORDERED := $(KERNEL_TESTS) $(addprefix $(BUILD)/test/,$(EMULATOR_TESTS) test_broken_thread)
in_random_order = $(call with,SIMT_ORDER=random SIMT_ASYNC=mixed SIMT_SEED=$(1),$(ORDERED))
LONG_TESTS = $(NUMBER_TESTS) '$(MUTATE) --sample 4' \
             $(call with_address,$(ADDRESS_TESTS)) \
             $(call with,OMP_NUM_THREADS=1,$(THREAD_TESTS)) \
             $(call with,BUILD=$(BUILD),test/test_scripts.sh) \
             $(call with,BUILD=$(BUILD) TEST_LONG=rest,$(BUILD)/test/test_distributed test/test_launch.sh) \
             $(call with,SIMT_ORDER=reverse SIMT_ASYNC=eager,$(ORDERED)) \
             $(call in_random_order,2)
test-long: all $(CUDA_OBJECTS_LONG) $(ORDERED) $(TESTED_TRAINERS) $(TESTED_KINDS) address-programs thread-programs unkind-programs \
           $(BUILD)/test/test_simt_trainer $(BUILD)/test/test_distributed
	@$(RUN_TESTS) $(LONG_TESTS)

MORE_TESTS = '$(MUTATE) --sample 30' \
             $(call with,BUILD=$(BUILD) TEST_LONG=rest,$(BUILD)/test/test_simt_trainer) \
             $(call with,SIMT_ORDER=reverse SIMT_ASYNC=eager TEST_LONG=1,$(ORDERED)) \
             $(call with_address,$(MORE_ADDRESS_TESTS)) \
             $(call in_random_order,3) $(ALL_NUMBER_TESTS)
test-everything: test-long more-address-programs
	@$(RUN_TESTS) $(MORE_TESTS)

# dev/simt/mutate.py breaks the kernels on purpose, one place at a time, and checks that the tests fail.
# test-long and test-everything run samples of these mutants.
MUTATE := CXX=$(CXX) MAKE=$(MAKE) dev/simt/mutate.py --build $(BUILD)/mutate
mutate:
	$(MUTATE) --report docs/results/mutation.md

# ----------------------------------------------------------------------------
# make gpu-check: all checks that need a GPU, in one command. Its script calls the two targets after it.

DEVICE_TESTS := $(if $(filter simt,$(DEVICE)),$(KERNEL_TESTS),$(GPU_TESTS))

.PHONY: gpu-check gpu-check-programs gpu-check-tests
gpu-check:
	@BUILD=$(BUILD) NVCC=$(NVCC) scripts/gpu_check.sh

gpu-check-programs: $(BUILD)/tokenizer $(BUILD)/train_gpt_cpu_fp32 $(GPU_TRAINERS) $(DEVICE_TESTS) \
                    $(BUILD)/test/test_simt_trainer $(foreach name,attention moba step,$(BUILD)/bench/$(name)_$(DEVICE)_bf16)

gpu-check-tests:
	@echo $(DEVICE_TESTS)
