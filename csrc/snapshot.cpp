// The Python module `_snapshot`: whether anything but gradients' addresses has changed since a step, asked of a thousand
// tensors at a time. It reads them as torch does, by torch's own headers, sooner than look.cpp can.
// These headers hold for one version of torch: with another, backends/library.py leaves this module alone.
#include <algorithm>
#include <set>
#include <stdexcept>
#include <vector>

#include "tensor_records.h"

namespace py = pybind11;

namespace {

using Words = std::vector<int64_t>;  // addresses among them

// A thousand parameters, gradients and states are more than a core's own caches hold. What is read of each is asked for
// so many tensors before; what leads to it as many before that.
constexpr size_t kAhead = 6;

template <class Record>
const Record& ahead(const std::vector<Record>& all, size_t i, size_t times = 1) {
  return all[std::min(i + times * kAhead, all.size() - 1)];
}

// A parameter, and its gradient if it has one; no more is looked at without.
struct Operand {
  PyObject* param;
  c10::TensorImpl* tensor = nullptr;  // if it has a gradient
  Memory memory{};
  const Layout *own = nullptr, *gradient = nullptr;  // in a set, for most tensors share one
  int64_t off_alignment = 0;  // the gradient's address
  const at::Tensor* grad = nullptr;  // where the gradient is kept

  C10_ALWAYS_INLINE void fetch_param() const {
    fetch(param);
    if (tensor) fetch_tensor(tensor), fetch_memory(memory.storage), fetch(grad);
  }

  C10_ALWAYS_INLINE void fetch_gradient() const {
    if (const auto* now = gradient_now()) fetch_tensor(now);
  }

  C10_ALWAYS_INLINE void fetch_gradients_memory() const {
    const auto* now = gradient_now();
    if (now && now->unsafe_storage()) fetch_memory(now->unsafe_storage().unsafeGetStorageImpl());
  }

  // If it had one.
  const c10::TensorImpl* gradient_now() const { return tensor ? gradient_of(impl_of(param)) : nullptr; }
};

int64_t off(int64_t address, int64_t alignment) { return address ? address & (alignment - 1) : -1; }

Operand operand_of(PyObject* param, int64_t alignment, std::set<Layout>& layouts, Words& gradients) {
  if (!is_plain(param)) throw std::invalid_argument("no tensor");
  c10::TensorImpl& own = impl_of(param);
  const c10::TensorImpl* gradient = gradient_of(own);
  if (!gradient) return {param};
  if (gradient->key_set().has(c10::DispatchKey::Python)) throw std::invalid_argument("its class answers for it");
  gradient->data();  // throws where there is none
  gradients.push_back(address_of(*gradient));
  return {param,
          &own,
          memory_of(own),
          &*layouts.insert(layout_of(own)).first,
          &*layouts.insert(layout_of(*gradient)).first,
          off(gradients.back(), alignment),
          grad_of(own)};
}

// Whether a parameter is the same; takes down where its gradient is.
bool is_same(PyObject* param, const Operand& before, int64_t alignment, Words& gradients) {
  if (param != before.param || !THPVariable_CheckExact(param)) return false;
  const c10::TensorImpl& own = impl_of(param);
  const c10::TensorImpl* gradient = gradient_of(own);
  if (!gradient || !before.tensor) return !gradient && !before.tensor;
  if (!before.memory.is_of(own) || !has_layout(own, *before.own) || !has_layout(*gradient, *before.gradient))
    return false;
  gradients.push_back(address_of(*gradient));
  return off(gradients.back(), alignment) == before.off_alignment;
}

// A tensor in a dict. Its address is kept from others, but not it, so that whoever drops a state has its memory back.
// Without a storage it is when nobody has it any more, and to swap what is held so torch refuses.
struct Held {
  c10::weak_intrusive_ptr<c10::TensorImpl> tensor;
  Memory memory;

  C10_ALWAYS_INLINE void fetch_state() const { fetch_place(tensor._unsafe_get_target()), fetch_memory(memory.storage); }
};

Held held_of(PyObject* object) {
  c10::TensorImpl& t = impl_of(object);
  return {c10::weak_intrusive_ptr<c10::TensorImpl>(THPVariable_Unpack(object).getIntrusivePtr()), memory_of(t)};
}

// The number that Python gives a dict anew whenever it is changed, and gives no other.
#if PY_VERSION_HEX < 0x030E0000
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
uint64_t version_of(PyObject* dict) { return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag; }
#else
uint64_t version_of(PyObject*) { return 0; }
#endif

// Whether it does: not from 3.14 on, and before nobody promises it (PEP 699).
bool has_versions() {
  static const bool has = [] {
    py::dict dict;
    const uint64_t first = version_of(dict.ptr());
    dict["key"] = 1;
    const uint64_t second = version_of(dict.ptr());
    dict["key"] = 2;
    return first != second && second != version_of(dict.ptr());
  }();
  return has;
}

struct Dict {
  PyObject* dict;
  uint64_t version;
  bool outermost;
};

// What is in dicts and in the dicts among that.
struct Entries {
  Words words;  // sizes, keys and values
  std::vector<Dict> dicts;
  std::vector<PyObject*> tensors, others;

  explicit Entries(const py::list& outermost) {
    for (const auto& dict : outermost) add(dict.ptr(), true);
  }

  // Whether none has changed. A dict in another is alive if that has not, which is looked at before.
  bool same_versions(const py::list& outermost) const {
    if (!has_versions()) return false;
    size_t i = 0;
    for (const Dict& each : dicts) {
      if (each.outermost && (i == outermost.size() || outermost[i++].ptr() != each.dict)) return false;
      if (version_of(each.dict) != each.version) return false;
    }
    return i == outermost.size();
  }

 private:
  void add(PyObject* dict, bool outermost) {
    dicts.push_back({dict, version_of(dict), outermost});
    words.push_back(PyDict_Size(dict));
    Py_ssize_t i = 0;
    PyObject *key, *value;
    while (PyDict_Next(dict, &i, &key, &value)) {
      words.push_back(word(key)), others.push_back(key);
      if (PyDict_Check(value)) {
        add(value, false);
      } else {
        words.push_back(word(value)), (is_plain(value) ? tensors : others).push_back(value);
      }
    }
  }
};

class Snapshot {
 public:
  // Objects are given to somebody who keeps them, so that no other comes to their addresses.
  Snapshot(const py::list& lists, const py::list& dicts, py::list kept, int64_t alignment)
      : alignment_(alignment), entries_(dicts) {
    for (PyObject* object : entries_.others) kept.append(py::handle(object));
    for (PyObject* tensor : entries_.tensors) held_.push_back(held_of(tensor));
    for (const auto& list : lists) {
      lengths_.push_back(PyList_Size(list.ptr()));
      for (const auto& param : list) {
        kept.append(param);
        operands_.push_back(operand_of(param.ptr(), alignment_, layouts_, gradients_));
      }
    }
  }

  // Whether nothing but gradients' addresses has changed.
  bool serves(const py::list& lists, const py::list& dicts) {
    before_.swap(gradients_), gradients_.clear();
    try {
      return same_operands(lists) && same_entries(dicts) && same_tensors();
    } catch (const std::exception&) {  // of a tensor that has no memory any more
      return false;
    }
  }

  // Whether these have, from one of the last two calls to the other.
  bool moved() const { return gradients_ != before_; }

  py::bytearray gradients() const {
    return py::bytearray(reinterpret_cast<const char*>(gradients_.data()), gradients_.size() * sizeof(int64_t));
  }

 private:
  bool same_operands(const py::list& lists) {
    if (lists.size() != lengths_.size()) return false;
    size_t seen = 0, j = 0;
    for (const auto& list : lists) {
      if (!PyList_Check(list.ptr()) || PyList_GET_SIZE(list.ptr()) != lengths_[j++]) return false;
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list.ptr()); ++i, ++seen) {
        ahead(operands_, seen, 3).fetch_param();
        ahead(operands_, seen, 2).fetch_gradient();
        ahead(operands_, seen).fetch_gradients_memory();
        if (!is_same(PyList_GET_ITEM(list.ptr(), i), operands_[seen], alignment_, gradients_)) return false;
      }
    }
    return true;
  }

  bool same_entries(const py::list& dicts) {
    if (entries_.same_versions(dicts)) return true;
    Entries now(dicts);
    if (now.words != entries_.words) return false;
    entries_.dicts.swap(now.dicts);
    return true;
  }

  bool same_tensors() const {
    for (size_t i = 0; i < held_.size(); ++i) {
      ahead(held_, i).fetch_state();
      if (!held_[i].memory.is_of(*held_[i].tensor._unsafe_get_target())) return false;
    }
    return true;
  }

  const int64_t alignment_;
  Entries entries_;
  std::set<Layout> layouts_;
  std::vector<Py_ssize_t> lengths_;
  std::vector<Operand> operands_;
  std::vector<Held> held_;
  Words gradients_, before_;
};

void increment_versions(const py::list& tensors) {
  for (const auto& tensor : tensors)
    if (!impl_of(tensor.ptr()).is_inference()) impl_of(tensor.ptr()).bump_version();
}

}  // namespace

PYBIND11_MODULE(_snapshot, m) {
  m.attr("torch_version") = VSGD_TORCH_VERSION;
  py::class_<Snapshot>(m, "Snapshot", py::module_local())
      .def(py::init<const py::list&, const py::list&, py::list, int64_t>())
      .def("serves", &Snapshot::serves)
      .def("moved", &Snapshot::moved)
      .def("gradients", &Snapshot::gradients);
  m.def("increment_versions", &increment_versions);
}
