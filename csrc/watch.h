// Notices when tensors have moved in memory. A table of addresses must not outlive that, and asking a thousand tensors one
// by one from Python costs more than stepping them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace vsgd {

class Watch {
 public:
  explicit Watch(std::vector<torch::stable::Tensor> tensors) : tensors_(std::move(tensors)) {
    for (const auto& tensor : tensors_) seen_.push_back(tensor.data_ptr());
  }

  bool moved() const {
    for (size_t i = 0; i < tensors_.size(); ++i)
      if (tensors_[i].data_ptr() != seen_[i]) return true;
    return false;
  }

 private:
  std::vector<torch::stable::Tensor> tensors_;
  std::vector<const void*> seen_;
};

}  // namespace vsgd
