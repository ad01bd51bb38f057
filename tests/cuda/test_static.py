"""The machine code of every CUDA kernel against its budget, and the proof that the inspection sees what is wrong."""

from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase

import pytest

from tests.cuda import static
from tests.cuda.budget import BUDGET, Budget

SOURCES = sorted(static.CSRC.glob("*/*_cuda.cu"))
LOCAL_MEMORY = ("LDL", "STL")

inspects = pytest.mark.skipif(static.missing() is not None, reason=static.missing() or "")


def findings(record: static.Record, budget: Budget) -> list[str]:
    """In what a kernel exceeds its budget."""
    wrong = []
    for name in ("stack", "spill_stores", "spill_loads", "shared"):
        if getattr(record, name):
            wrong.append(f"{name}: {getattr(record, name)} bytes")
    wrong += [f"{n} {opcode}" for opcode in LOCAL_MEMORY if (n := record.count(opcode))]
    if record.registers > budget.registers:
        wrong.append(f"{record.registers} registers, at most {budget.registers}")
    if (n := record.count("DFMA+DADD+DMUL+DSETP")) > budget.float64:
        wrong.append(f"{n} float64 instructions, at most {budget.float64}")
    blocks = static.occupancy(record.registers, budget.threads, budget.shared, record.arch)
    least = budget.blocks if isinstance(budget.blocks, int) else budget.blocks.get(record.arch, 1)
    if blocks < least:
        wrong.append(f"{blocks} blocks per multiprocessor, at least {least}")
    for opcode, (fewest, most) in budget.opcodes.items():
        n = record.count(opcode)
        if n < fewest or (most is not None and n > most):
            wrong.append(f"{n} {opcode}, expected {fewest} to {'any' if most is None else most}")
    return wrong


def entries(name: str) -> list[str]:
    return [key for key in BUDGET if fnmatchcase(name, key)]


@pytest.fixture(scope="module")
def kernels():
    """Every kernel, by "<operator's folder>/<name>", on every architecture."""
    jobs = [(source, arch) for source in SOURCES for arch in static.known_archs()]
    with ThreadPoolExecutor(2) as pool:  # of processes: nvcc's
        compiled = list(pool.map(lambda job: static.nvcc_records(*job), jobs))
    return [(f"{source.parent.name}/{r.name}", r) for (source, _), found in zip(jobs, compiled) for r in found]


@inspects
def test_every_kernel_keeps_its_budget(kernels):
    wrong = {}
    for name, record in kernels:
        keys = entries(name)
        found = findings(record, BUDGET[keys[0]]) if len(keys) == 1 else [f"{len(keys)} entries in the budget: {keys}"]
        if found:
            wrong[f"{name} on sm_{record.arch}"] = found
    assert not wrong, "\n".join(f"{name}: {'; '.join(found)}" for name, found in wrong.items())


@inspects
def test_every_budget_has_its_kernel(kernels):
    names = {name for name, _ in kernels}
    unused = [key for key in BUDGET if not any(fnmatchcase(name, key) for name in names)]
    assert not unused, f"the budget has entries without a kernel: {unused}"


LERP = "_ZN4atst50_GLOBAL__N__c46c39cf_11_ema_cuda_cu_6e911741_215054lerpEPfPKffl"
HOARD_96 = "_ZN4atst43_GLOBAL__N__28ce9cee_5_sp_cu_5dce5ca8_215465hoardILi96EEEvPf"
PTXAS = f"""\
ptxas info    : 28 bytes gmem
ptxas info    : Compiling entry function '{LERP}' for 'sm_90'
ptxas info    : Function properties for {LERP}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 1 barriers, 2048 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '{HOARD_96}' for 'sm_90'
ptxas info    : Function properties for {HOARD_96}
    584 bytes stack frame, 688 bytes spill stores, 692 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 584 bytes cumulative stack size
"""
SASS = f"""
		Function : {LERP}
        /*0000*/                   EXIT ;                                     /* 0x000000000000794d */
	code for sm_90
		Function : {HOARD_96}
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                     /* 0x00000a00ff017b82 */
                                                                              /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR6][R2.64] ;  /* 0x0000000604007981 */
        /*0020*/             @!UP1 FFMA R3, R3, R4, R5 ;                      /* 0x0000000604007981 */
        /*0030*/                   LDG.E R4, desc[UR6][R2.64] ;               /* 0x0000000604007981 */
        /*0040*/                   STL [R1], R4 ;                             /* 0x0000000604007981 */
        /*0050*/               @P0 BRA 0x20 ;                                 /* 0xffffff6000000947 */
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;              /* 0x0000000000007b1d */
        /*0070*/                   BRA 0x10060;                               /* 0xffffff6000000947 */
        /*10050*/                  NOP;                                       /* 0x0000000000007918 */
"""


def recorded():
    return static.records(90, PTXAS, SASS)


def test_what_ptxas_and_cuobjdump_print_is_read():
    lerp, hoard = recorded()
    assert (lerp.name, lerp.registers, lerp.stack, lerp.spill_stores, lerp.shared) == ("lerp", 12, 0, 0, 2048)
    assert (hoard.name, hoard.stack, hoard.spill_stores, hoard.spill_loads) == ("hoard<96>", 584, 688, 692)
    first = {"LDC": 1, "LDG.E.128.CONSTANT": 1, "FFMA": 1, "LDG.E": 1, "STL": 1, "BRA": 1}
    assert hoard.code.opcodes == first | {"BRA": 2, "BAR.SYNC.DEFER_BLOCKING": 1}
    assert [section.opcodes for section in hoard.sections] == [first, {"BRA": 1}]
    assert hoard.loops == (static.Code(0x20, 0x50, {"FFMA": 1, "LDG.E": 1, "STL": 1, "BRA": 1}),)
    assert [hoard.count(p) for p in ("LDG", "LDG.128", "STL", "ST", "FFMA+STL")] == [2, 1, 1, 0, 2]


def test_what_ptxas_does_not_say_is_an_error():
    with pytest.raises(ValueError, match="says nothing of"):
        static.parse_ptxas(PTXAS.replace("12 registers", "a few registers"))


def test_names_keep_their_template_arguments():
    assert (
        static._short("void atst::(anonymous namespace)::k<(int)4, a::F(*)(int)>(float*)") == "k<(int)4, a::F(*)(int)>"
    )
    assert static._short("atst::ema::update(atst::Table)") == "update"


def test_everything_beyond_a_budget_is_found():
    lerp, hoard = recorded()
    budget = Budget(threads=1024, registers=24, blocks=3, opcodes={"LDG.128": (2, None), "FFMA": (0, 0)})
    assert findings(hoard, budget) == [
        "stack: 584 bytes",
        "spill_stores: 688 bytes",
        "spill_loads: 692 bytes",
        "1 STL",
        "32 registers, at most 24",
        "2 blocks per multiprocessor, at least 3",
        "1 LDG.128, expected 2 to any",
        "1 FFMA, expected 0 to 0",
    ]
    assert findings(lerp, Budget(threads=256, registers=12, blocks={90: 8})) == ["shared: 2048 bytes"]


@pytest.mark.parametrize(
    "registers, threads, shared, arch, blocks",
    [
        (32, 1024, 0, 90, 2),
        (33, 1024, 0, 90, 1),  # 40 registers per thread after rounding: 51 warps
        (64, 256, 0, 90, 4),
        (168, 384, 0, 90, 1),
        (32, 32, 0, 90, 32),
        (32, 256, 100 << 10, 90, 2),
        (32, 256, 100 << 10, 80, 1),
        (32, 256, 227 << 10, 100, 1),
        (32, 256, 228 << 10, 100, 0),
    ],
)
def test_occupancy(registers, threads, shared, arch, blocks):
    assert static.occupancy(registers, threads, shared, arch) == blocks


HOARD = """
template <int N> __global__ void __launch_bounds__(1024, 2) hoard(float* x) {
  float v[N];
  for (int i = 0; i < N; ++i) v[i] = x[i * 4096 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < N; ++i) x[i * 4096 + threadIdx.x] = v[i] * v[(i * 7 + 3) % N];
}
template __global__ void hoard<96>(float*);
"""


@inspects
def test_a_kernel_that_spills_is_caught(tmp_path):
    source = tmp_path / "hoard_cuda.cu"
    source.write_text(HOARD)
    (record,) = static.nvcc_records(source, 90, tmp_path)
    found = findings(record, Budget(threads=1024, registers=64))
    assert record.name == "hoard<96>"
    assert [f.split(":")[0] for f in found[:3]] == ["stack", "spill_stores", "spill_loads"]
    assert record.count("STL") > 50
    assert static.nvcc_records(source, 90, tmp_path) == [record]  # from the cache


@inspects
def test_float64_by_accident_is_caught(tmp_path):
    source = tmp_path / "twice_cuda.cu"
    source.write_text("__global__ void twice(float* x) { x[threadIdx.x] *= 2.1; }")
    (record,) = static.nvcc_records(source, 90, tmp_path)
    assert findings(record, Budget(threads=256, registers=64)) == ["1 float64 instructions, at most 0"]


@inspects
def test_a_damaged_file_of_results_is_made_anew(tmp_path):
    source = tmp_path / "hoard_cuda.cu"
    source.write_text("__global__ void one(float* x) { *x = 1; }")
    records = static.nvcc_records(source, 90, tmp_path)
    (path,) = tmp_path.glob("*.json")
    path.write_text(path.read_text()[:20])
    assert static.nvcc_records(source, 90, tmp_path) == records


@inspects
def test_what_does_not_compile_is_an_error(tmp_path):
    source = tmp_path / "bad_cuda.cu"
    source.write_text("this is no C++")
    with pytest.raises(RuntimeError, match=r"bad_cuda.cu does not compile for sm_90:\n.*error"):
        static.nvcc_records(source, 90, tmp_path)
