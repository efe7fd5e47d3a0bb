// What the module `_snapshot` looks at of a tensor, and keeps of that to compare. Compiled for one version of torch.
#pragma once

#include <torch/csrc/autograd/python_variable.h>

#include <optional>
#include <stdexcept>
#include <vector>

namespace {

int64_t word(const void* address) { return reinterpret_cast<int64_t>(address); }

// Tensors of other classes may have gradients and memory that C++ does not see.
bool is_plain(PyObject* object) {
  if (THPVariable_CheckExact(object)) return true;
  if (PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(THPVariableClass)))
    throw std::invalid_argument("a tensor of a class of its own");
  return false;
}

c10::TensorImpl& impl_of(PyObject* tensor) { return *THPVariable_Unpack(tensor).unsafeGetTensorImpl(); }

// Members that a tensor's functions return once they have asked whether it is of a kind that has none such, a fifth of
// the time. Keys tell the kind; tensors of a class that answers in Python, as it likes, are looked at elsewhere.
struct Member : c10::TensorImpl {
  static constexpr auto offset = &Member::storage_offset_;
  static constexpr auto numel = &Member::numel_;
  static constexpr auto shape = &Member::sizes_and_strides_;
  static constexpr auto dtype = &Member::data_type_;
  static constexpr auto device = &Member::device_opt_;
};

// Asks for what is read soon. (gcc leaves out calls of a function that does nothing else, unless it is to inline it.)
C10_ALWAYS_INLINE void fetch(const void* address) { __builtin_prefetch(address); }

C10_ALWAYS_INLINE void fetch_place(const c10::TensorImpl* t) {
  fetch(&t->unsafe_storage()), fetch(&(t->*Member::offset));
}

C10_ALWAYS_INLINE void fetch_tensor(const c10::TensorImpl* t) {
  constexpr size_t kLine = 64;
  fetch_place(t), fetch(reinterpret_cast<const char*>(&(t->*Member::offset)) - kLine);  // sizes and strides
}

C10_ALWAYS_INLINE void fetch_memory(c10::StorageImpl* storage) { fetch(&storage->_mutable_data_ptr_no_checks()); }

// The memory of a tensor that is written to. The context is another when it is shared until somebody writes.
struct Memory {
  c10::StorageImpl* storage;
  const void *data, *context;
  int64_t offset;

  bool is_of(const c10::TensorImpl& t) const {
    if (t.unsafe_storage().unsafeGetStorageImpl() != storage) return false;
    const c10::DataPtr& now = storage->_mutable_data_ptr_no_checks();
    return now.get() == data && now.get_context() == context && t.*Member::offset == offset;
  }
};

Memory memory_of(c10::TensorImpl& t) {
  t.mutable_data();  // throws where there is none
  c10::StorageImpl* storage = t.unsafe_storage().unsafeGetStorageImpl();
  const c10::DataPtr& now = storage->_mutable_data_ptr_no_checks();
  return {storage, now.get(), now.get_context(), t.storage_offset()};
}

// All that a launch depends on but the address: keys, dtype, device, sizes and strides. The keys tell what is dense, what
// negates its memory, and what would have to be asked in Python.
using Layout = std::vector<int64_t>;

int64_t keys_of(const c10::TensorImpl& t) { return int64_t(t.key_set().raw_repr()); }

int64_t kind_of(const c10::TensorImpl& t) {
  const std::optional<c10::Device> device = t.*Member::device;
  const auto place = device ? uint8_t(device->type()) << 8 | uint8_t(device->index()) : -1;
  return int64_t(place) << 16 | int64_t((t.*Member::dtype).toScalarType());
}

Layout layout_of(const c10::TensorImpl& t) {
  Layout layout{keys_of(t), kind_of(t)};
  for (const c10::IntArrayRef part : {t.sizes(), t.strides()}) layout.insert(layout.end(), part.begin(), part.end());
  return layout;
}

bool has_layout(const c10::TensorImpl& t, const Layout& layout) {
  const c10::impl::SizesAndStrides& shape = t.*Member::shape;
  const size_t dims = shape.size();
  if (layout.size() != 2 + 2 * dims || keys_of(t) != layout[0] || kind_of(t) != layout[1]) return false;
  const int64_t *sizes = layout.data() + 2, *strides = sizes + dims;
  int64_t differing = 0;
  for (size_t d = 0; d < dims; ++d)
    differing |= (shape.sizes_data()[d] ^ sizes[d]) | (shape.strides_data()[d] ^ strides[d]);
  return !differing;
}

// Where a tensor's gradient is kept; TensorImpl::grad calls three functions for it.
const at::Tensor* grad_of(const c10::TensorImpl& t) {
  const auto* meta = static_cast<const torch::autograd::AutogradMeta*>(t.autograd_meta());
  return meta ? &meta->grad_ : nullptr;
}

const c10::TensorImpl* gradient_of(const c10::TensorImpl& t) {
  const at::Tensor* grad = grad_of(t);
  return grad && grad->defined() ? grad->unsafeGetTensorImpl() : nullptr;
}

// The address of a gradient; 0 of one that is empty or has none. TensorImpl::data calls two functions for it.
int64_t address_of(const c10::TensorImpl& t) {
  const c10::StorageImpl* storage = t.unsafe_storage().unsafeGetStorageImpl();
  const auto* begin = storage ? static_cast<const char*>(storage->data()) : nullptr;
  return begin && t.*Member::numel ? word(begin + t.*Member::offset * int64_t((t.*Member::dtype).itemsize())) : 0;
}

}  // namespace
