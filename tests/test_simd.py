"""The functions of csrc/simd.h against the C library's in double precision, for every instruction set."""

import subprocess
from pathlib import Path

import pytest

import setup
from tests import tolerances as tol

CSRC = Path(__file__).parent.parent / "csrc"
# the largest error of each function in units in the last place of the float32 result
PROGRAM = """
#include <cmath>
#include <cstdio>
#define ATST_ISA checked
#include "simd.h"
using namespace atst::checked;

template <class F, class G>
void check(const char* name, double from, double to, F f, G exact) {
  double worst = 0;
  const int n = 1 << 20;
  for (int i = 0; i < n; i += kLanes) {
    float x[kLanes], y[kLanes];
    for (int j = 0; j < kLanes; ++j) x[j] = float(from + (to - from) * (i + j) / n);
    store(y, f(load(x)));
    for (int j = 0; j < kLanes; ++j) {
      const double want = exact(double(x[j]));
      const float rounded = std::fabs(float(want));
      worst = std::fmax(worst, std::fabs(y[j] - want) / (std::nextafterf(rounded, INFINITY) - rounded));
    }
  }
  std::printf("%s %g\\n", name, worst);
}

int main() {
  const auto e = [](vf x) { return atst::checked::exp(x); };
  const auto power = [](vf x) { return exp2_of_negative(x); };
  const auto l = [](vf x) { return atst::checked::log(x); };
  check("exp", -87.3, 88.7, e, [](double x) { return std::exp(x); });
  check("exp", -1, 1, e, [](double x) { return std::exp(x); });
  check("exp2_of_negative", -126, 0, power, [](double x) { return std::exp2(x); });
  check("exp2_of_negative", -1, 0, power, [](double x) { return std::exp2(x); });
  check("log", 1.2e-38, 1e-30, l, [](double x) { return std::log(x); });
  check("log", 0.5, 2, l, [](double x) { return std::log(x); });
  check("log", 1, 1e38, l, [](double x) { return std::log(x); });
}
"""


def test_largest_errors(isa, tmp_path):
    source, program = tmp_path / "check.cpp", tmp_path / "check"
    source.write_text(PROGRAM)
    flags = [*setup.CXX_FLAGS, *setup.SIMD_FLAGS, *setup.ISAS[isa], f"-I{CSRC}"]
    done = subprocess.run([setup.tool("CXX"), *flags, source, "-o", program], capture_output=True, text=True)
    if done.returncode:
        pytest.fail(done.stderr)
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 7
    for line in lines:
        assert float(line.split()[1]) <= tol.SIMD_ULP, line
