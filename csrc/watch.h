// Notices when tensors have moved in memory. A table of addresses must not outlive that, and asking a thousand tensors one
// by one from Python costs more than stepping them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdint>
#include <vector>

namespace vsgd {

class Watch {
 public:
  explicit Watch(std::vector<torch::stable::Tensor> tensors) : tensors_(std::move(tensors)) {
    for (const auto& tensor : tensors_) seen_.push_back(tensor.data_ptr());
  }

  bool moved() const {
    std::atomic<bool> any{false};
    constexpr int64_t kGrain = 512;  // tensors
    torch::stable::parallel_for(0, int64_t(tensors_.size()), kGrain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        if (tensors_[i].data_ptr() != seen_[i]) any = true;
    });
    return any;
  }

 private:
  std::vector<torch::stable::Tensor> tensors_;
  std::vector<const void*> seen_;
};

}  // namespace vsgd
