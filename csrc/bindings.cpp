// Python module atst_fast._C. Importing it registers the operators (library.cpp); it never sees a Tensor.
#include <pybind11/pybind11.h>

#include <string>

#include "dispatch.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Operators of atst_fast (torch.ops.atst_fast) and what this build contains.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = ATST_COMPILER;
        info["torch_at_build"] = ATST_TORCH_VERSION;
        info["cuda"] = ATST_CUDA;
        info["isa"] = atst::isa_name(atst::active_isa());
        info["best_isa"] = atst::isa_name(atst::best_isa());
        return info;
      },
      "Compiler, torch version at build time, the GPUs that there are CUDA kernels for (or \"none: why\"), and the CPU "
      "instruction set in use.");
  m.def(
      "force_isa",
      [](const std::string& name) {
        if (!atst::force_isa(name.c_str()))
          throw py::value_error("force_isa: this machine cannot run '" + name +
                                "'; expected '', 'portable', 'avx2' or 'avx512', at most '" +
                                atst::isa_name(atst::best_isa()) + "'");
      },
      py::arg("name"),
      "Run the kernels of another instruction set ('' returns to the best); for tests and benchmarks.");
}
