# Rules of the benchmarks. The Makefile at the top of the tree includes this file, and runs all commands there.

# ----------------------------------------------------------------------------
# Benchmarks for the CPU, and NAME_DEVICE_PRECISION for a GPU or the emulator. The emulator shows only that they run.

BENCHES := $(BUILD)/bench/attention $(BUILD)/bench/moba $(BUILD)/bench/step

$(BENCHES): $(BUILD)/bench/%: dev/bench/%.c Makefile dev/bench/bench.mk
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CPU) $(call precision,fp32) -MF $@.d $< -o $@ $(call onednn,fp32) $(TRAIN_LIBS)

GPU_BENCHES := $(foreach name,attention moba step,$(foreach device,simt cuda,$(foreach p,bf16 fp32,$(BUILD)/bench/$(name)_$(device)_$(p))))
bench_flags = $(call precision,$(call flag,3)) -MF $@.d
bench_simt = $(SIMT) $(bench_flags) -x c++ $< -o $@ $(TRAIN_LIBS)
bench_cuda = $(NVCC) $(CUDA_COMMON) $(GPU_ARCH) $(bench_flags) -x cu $< -o $@ $(CUDA_LIBS) $(TRAIN_LIBS)
$(filter $(BUILD)/bench/step%,$(GPU_BENCHES)): $(BUILD)/bench/%: dev/bench/step.c Makefile dev/bench/bench.mk
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(bench_$(call flag,2))

$(filter $(BUILD)/bench/attention%,$(GPU_BENCHES)): $(BUILD)/bench/%: dev/bench/attention.cu Makefile dev/bench/bench.mk
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(bench_$(call flag,2))

$(filter $(BUILD)/bench/moba_%,$(GPU_BENCHES)): $(BUILD)/bench/%: dev/bench/moba.cu Makefile dev/bench/bench.mk
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
# docs/results/kernels.md gets registers and shared memory from ptxas, the shared memory of launches from the
# emulator, and operation counts from formulas.

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
