// What Python calls: its tensors as pointers, and its registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <string>
#include <utility>

#include "samples_device.h"
#include "step_cpu.h"
#include "step_device.h"
#include "watch.h"

using torch::stable::Tensor;

namespace {

const vsgd::Row* rows_of(const Tensor& rows) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(1) == vsgd::kColumns, "rows: expected ", vsgd::kColumns, " columns");
  return reinterpret_cast<const vsgd::Row*>(rows.const_data_ptr<int64_t>());
}

const float* scalar_of(const std::optional<Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; }

void check_known(bool known, const std::string& rule) { STD_TORCH_CHECK(known, "rule: unknown ", rule); }

int64_t best_isa() { return int64_t(vsgd::detect_isa()); }

vsgd::Isa isa_of(const std::string& name) {
  using vsgd::Isa;
  const std::pair<const char*, Isa> names[] = {{"auto", Isa::automatic}, {"baseline", Isa::baseline}, {"avx2", Isa::avx2},
                                               {"avx512", Isa::avx512}, {"avx512vbmi", Isa::avx512vbmi}};
  const auto* found = std::find_if(std::begin(names), std::end(names), [&](const auto& each) { return each.first == name; });
  STD_TORCH_CHECK(found != std::end(names), "isa: unknown ", name);
  const Isa best = vsgd::detect_isa();
  STD_TORCH_CHECK(found->second <= best, "isa: this processor or build has no ", name);
  return found->second == Isa::automatic ? best : found->second;
}

vsgd::CpuBatch batch_of(const Tensor& rows, const Tensor& grads, const Tensor& layouts, const std::string& isa) {
  return {rows_of(rows), grads.const_data_ptr<int64_t>(), rows.size(0), layouts.const_data_ptr<int64_t>(), isa_of(isa)};
}

void step_cpu(const Tensor& rows, const Tensor& grads, const Tensor& layouts, const Tensor& hyper, std::string rule,
              std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, std::string isa) {
  const vsgd::CpuStep step{batch_of(rows, grads, layouts, isa),
                           hyper.const_data_ptr<double>(),
                           {scalar_of(grad_scale), scalar_of(found_inf)}};
  check_known(vsgd::step_cpu(rule, step), rule);
}

double norm_cpu(const Tensor& rows, const Tensor& grads, const Tensor& layouts, std::string isa) {
  return vsgd::norm_cpu(batch_of(rows, grads, layouts, isa));
}

const vsgd::SampleRow* sample_rows_of(const Tensor& rows) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(1) == vsgd::kSampleColumns, "rows: expected ", vsgd::kSampleColumns,
                  " columns");
  return reinterpret_cast<const vsgd::SampleRow*>(rows.const_data_ptr<int64_t>());
}

void add_samples_cpu(const Tensor& rows, const Tensor& samples, const Tensor& counts, const Tensor& layouts,
                     std::string isa) {
  vsgd::add_samples_cpu({sample_rows_of(rows), samples.const_data_ptr<int64_t>(), counts.const_data_ptr<int64_t>(),
                         rows.size(0), layouts.const_data_ptr<int64_t>(), isa_of(isa)});
}

vsgd::Kind kind_of(std::string rule, int64_t dtype, int64_t path, int64_t format) {
  return {std::move(rule), dtype, vsgd::Path(path), vsgd::Format(format)};
}

void step_device(const Tensor& rows, const Tensor& grads, const Tensor& layouts, const Tensor& chunk_tensor,
                 const Tensor& first_chunk, const Tensor& scalar_row, const Tensor& scalars,
                 std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, int64_t chunk, int64_t elements,
                 std::string rule, int64_t dtype, int64_t path, int64_t format) {
  const vsgd::Kind kind = kind_of(std::move(rule), dtype, path, format);
  const vsgd::Step step{rows_of(rows),
                        grads.const_data_ptr<int64_t>(),
                        layouts.const_data_ptr<int64_t>(),
                        chunk_tensor.const_data_ptr<int32_t>(),
                        first_chunk.const_data_ptr<int64_t>(),
                        scalar_row.const_data_ptr<int64_t>(),
                        scalars.data_ptr(),
                        {scalar_of(grad_scale), scalar_of(found_inf)},
                        chunk_tensor.numel(),
                        chunk,
                        vsgd::warps_of(elements, chunk_tensor.numel(), kind.format)};
#ifdef USE_CUDA
  if (rows.is_cuda()) return check_known(vsgd::step_on_cuda(step, kind, rows.get_device_index()), kind.rule);
#endif
  check_known(vsgd::step_on_host(step, kind), kind.rule);
}

void count_device(const Tensor& rows, const Tensor& hyper, Tensor scalars, std::optional<Tensor> found_inf,
                  std::string rule, int64_t dtype) {
  const vsgd::Count count{rows_of(rows), hyper.const_data_ptr<double>(), scalars.data_ptr(), scalar_of(found_inf),
                          rows.size(0)};
  const vsgd::Kind kind = kind_of(std::move(rule), dtype, 0, 0);
#ifdef USE_CUDA
  if (rows.is_cuda()) return check_known(vsgd::count_on_cuda(count, kind, rows.get_device_index()), kind.rule);
#endif
  check_known(vsgd::count_on_host(count, kind), kind.rule);
}

void add_samples_device(const Tensor& rows, const Tensor& samples, const Tensor& counts, const Tensor& layouts,
                        const Tensor& chunk_tensor, const Tensor& first_chunk, int64_t chunk, int64_t elements,
                        int64_t dtype, int64_t path) {
  const vsgd::SampleStep step{sample_rows_of(rows),
                              samples.const_data_ptr<int64_t>(),
                              counts.const_data_ptr<int64_t>(),
                              layouts.const_data_ptr<int64_t>(),
                              chunk_tensor.const_data_ptr<int32_t>(),
                              first_chunk.const_data_ptr<int64_t>(),
                              chunk_tensor.numel(),
                              chunk,
                              vsgd::warps_of(elements, chunk_tensor.numel(), vsgd::Format::fp32)};
#ifdef USE_CUDA
  if (rows.is_cuda()) return vsgd::add_samples_on_cuda(step, dtype, vsgd::Path(path), rows.get_device_index());
#endif
  vsgd::add_samples_on_host(step, dtype, vsgd::Path(path));
}

// A watch is known to Python by its address.
int64_t watch(std::vector<Tensor> tensors) { return reinterpret_cast<int64_t>(new vsgd::Watch(std::move(tensors))); }
bool watch_moved(int64_t watch) { return reinterpret_cast<const vsgd::Watch*>(watch)->moved(); }
void watch_end(int64_t watch) { delete reinterpret_cast<vsgd::Watch*>(watch); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vsgd_kernels, m) {
  m.def(
      "_step_cpu(Tensor rows, Tensor grads, Tensor layouts, Tensor hyper, str rule, Tensor? grad_scale, "
      "Tensor? found_inf, str isa) -> ()");
  m.def("_norm_cpu(Tensor rows, Tensor grads, Tensor layouts, str isa) -> float");
  m.def("_add_samples_cpu(Tensor rows, Tensor samples, Tensor counts, Tensor layouts, str isa) -> ()");
  m.def(
      "_step_device(Tensor rows, Tensor grads, Tensor layouts, Tensor chunk_tensor, Tensor first_chunk, "
      "Tensor scalar_row, Tensor scalars, Tensor? grad_scale, Tensor? found_inf, int chunk, int elements, str rule, "
      "int dtype, int path, int format) -> ()");
  m.def(
      "_count_device(Tensor rows, Tensor hyper, Tensor(a!) scalars, Tensor? found_inf, str rule, int dtype) -> ()");
  m.def(
      "_add_samples_device(Tensor rows, Tensor samples, Tensor counts, Tensor layouts, Tensor chunk_tensor, "
      "Tensor first_chunk, int chunk, int elements, int dtype, int path) -> ()");
  m.def("_best_isa() -> int");
  m.def("_watch(Tensor[] tensors) -> int");
  m.def("_watch_moved(int watch) -> bool");
  m.def("_watch_end(int watch) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vsgd_kernels, CPU, m) {
  m.impl("_step_cpu", TORCH_BOX(&step_cpu));
  m.impl("_norm_cpu", TORCH_BOX(&norm_cpu));
  m.impl("_add_samples_cpu", TORCH_BOX(&add_samples_cpu));
  m.impl("_step_device", TORCH_BOX(&step_device));
  m.impl("_count_device", TORCH_BOX(&count_device));
  m.impl("_add_samples_device", TORCH_BOX(&add_samples_device));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(vsgd_kernels, CUDA, m) {
  m.impl("_step_device", TORCH_BOX(&step_device));
  m.impl("_count_device", TORCH_BOX(&count_device));
  m.impl("_add_samples_device", TORCH_BOX(&add_samples_device));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(vsgd_kernels, CompositeExplicitAutograd, m) {
  m.impl("_best_isa", TORCH_BOX(&best_isa));
  m.impl("_watch", TORCH_BOX(&watch));
  m.impl("_watch_moved", TORCH_BOX(&watch_moved));
  m.impl("_watch_end", TORCH_BOX(&watch_end));
}
