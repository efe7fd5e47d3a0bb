// What launches take of CUDA and of torch: the device, and torch's current stream.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include "lanes.h"

#ifdef __GNUC__
// Weak, so that a library with these kernels also loads into a torch without CUDA, where nothing calls them.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
__attribute__((weak)) AOTITorchError aoti_torch_create_cuda_guard(int32_t, CUDAGuardHandle*);
__attribute__((weak)) AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle);
__attribute__((weak)) AOTITorchError torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool, char**);
__attribute__((weak)) void torch_c10_cuda_free_error_msg(char*);
}
#endif

namespace vsgd {

constexpr int kThreads = kWarps * kLanes;

// Makes a device the current one for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device) { TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(device, &handle_)); }
  ~DeviceGuard() { aoti_torch_delete_cuda_guard(handle_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  CUDAGuardHandle handle_ = nullptr;
};

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace vsgd
