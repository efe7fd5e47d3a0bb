// Registration: names, and which instantiation a name means; nothing else.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "rules.h"
#include "step_cpu.h"
#include "watch.h"

using torch::stable::Tensor;

namespace {

const float* scalar_of(const std::optional<Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; }

vsgd::Isa isa_of(const std::string& name) {
  if (name == "auto") return vsgd::Isa::automatic;
  if (name == "baseline") return vsgd::Isa::baseline;
  vsgd::Isa isa = name == "avx2" ? vsgd::Isa::avx2 : vsgd::Isa::avx512;
  STD_TORCH_CHECK(isa <= vsgd::detect_isa(), "isa: this processor has no ", name);
  return isa;
}

void step_cpu(const Tensor& table, const Tensor& layouts, const Tensor& hyper, std::string rule,
              std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, std::string isa) {
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == vsgd::kColumns, "table: expected ", vsgd::kColumns, " columns");
  const auto* rows = reinterpret_cast<const vsgd::Row*>(table.const_data_ptr<int64_t>());
  const vsgd::Amp amp{scalar_of(grad_scale), scalar_of(found_inf)};
  auto step = rule == "vsgd" ? vsgd::step_cpu<vsgd::Vsgd> : nullptr;
  STD_TORCH_CHECK(step != nullptr, "rule: unknown ", rule);
  step(rows, table.size(0), layouts.const_data_ptr<int64_t>(), hyper.const_data_ptr<double>(), amp, isa_of(isa));
}

// A watch is known to Python by its address.
int64_t watch(std::vector<Tensor> tensors) { return reinterpret_cast<int64_t>(new vsgd::Watch(std::move(tensors))); }
bool watch_moved(int64_t watch) { return reinterpret_cast<const vsgd::Watch*>(watch)->moved(); }
void watch_end(int64_t watch) { delete reinterpret_cast<vsgd::Watch*>(watch); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vsgd_kernels, m) {
  m.def(
      "_step_cpu(Tensor table, Tensor layouts, Tensor hyper, str rule, Tensor? grad_scale, Tensor? found_inf, "
      "str isa) -> ()");
  m.def("_watch(Tensor[] tensors) -> int");
  m.def("_watch_moved(int watch) -> bool");
  m.def("_watch_end(int watch) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vsgd_kernels, CPU, m) { m.impl("_step_cpu", TORCH_BOX(&step_cpu)); }

STABLE_TORCH_LIBRARY_IMPL(vsgd_kernels, CompositeExplicitAutograd, m) {
  m.impl("_watch", TORCH_BOX(&watch));
  m.impl("_watch_moved", TORCH_BOX(&watch_moved));
  m.impl("_watch_end", TORCH_BOX(&watch_end));
}
