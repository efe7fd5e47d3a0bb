// The Python module `_C`: what the host asks of a thousand tensors before each step, and Python takes longer to answer
// than the step takes. It uses Python's limited API and, to look at tensors, DLPack's table of functions, which torch
// offers to others for this: neither changes from version to version. backends/seen.py says the same in Python.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#undef TORCH_TARGET_VERSION  // torch's own headers are not included here, and with it torch hides DLPack's
#include <ATen/dlpack.h>

#include <vector>

namespace {

using Words = std::vector<int64_t>;

const char* chars(const Words& words) { return reinterpret_cast<const char*>(words.data()); }
Py_ssize_t size(const Words& words) { return Py_ssize_t(words.size() * sizeof(int64_t)); }

DLPackDLTensorFromPyObjectNoSync describe = nullptr;
PyObject *tensor_type = nullptr, *parameter_type = nullptr;  // kept for as long as the process runs

// Whether a tensor holds other tensors and no memory of its own, as DTensors do; DLPack then gives what is no address.
bool wraps(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("__tensor_flatten__");
  auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  return type != tensor_type && type != parameter_type && PyObject_HasAttr(tensor, name);
}

// Appends a dense tensor's device, dtype, shape and strides; returns its address, or -1 where it has no memory.
int64_t look_at(PyObject* tensor, Words& layouts) {
  DLTensor t;
  if (wraps(tensor) || describe(tensor, &t) != 0) {
    PyErr_Clear();
    return -1;
  }
  bool empty = false;
  layouts.push_back(int64_t(t.device.device_type) << 32 | t.device.device_id);
  layouts.push_back(int64_t(t.ndim) << 32 | t.dtype.code << 8 | t.dtype.bits);
  for (int d = 0; d < t.ndim; ++d) {
    empty |= t.shape[d] == 0;
    layouts.push_back(t.shape[d]);
    layouts.push_back(t.shape[d] == 1 ? 0 : t.strides[d]);  // a stride that leads nowhere may be any
  }
  return t.data || empty ? reinterpret_cast<int64_t>(t.data) : -1;
}

// look(lists of parameters) -> (gradients, their addresses, layouts)
PyObject* look(PyObject*, PyObject* lists) {
  static PyObject* const name = PyUnicode_InternFromString("grad");
  PyObject* grads = PyList_New(0);
  Words addresses, layouts;
  bool known = true;
  for (Py_ssize_t j = 0, groups = PyList_Size(lists); grads && j < groups; ++j) {
    PyObject* params = PyList_GetItem(lists, j);
    for (Py_ssize_t i = 0, n = PyList_Size(params); grads && i < n; ++i) {
      PyObject* param = PyList_GetItem(params, i);
      PyObject* grad = PyObject_GetAttr(param, name);
      if (!grad) {
        Py_CLEAR(grads);
      } else if (grad == Py_None) {
        layouts.push_back(-1);
      } else {
        layouts.push_back(look_at(param, layouts));
        addresses.push_back(look_at(grad, layouts));
        known &= layouts.back() != -1 && addresses.back() != -1;
        if (PyList_Append(grads, grad) != 0) Py_CLEAR(grads);
      }
      Py_XDECREF(grad);
    }
  }
  if (PyErr_Occurred()) Py_CLEAR(grads);  // also where one is no list
  if (!grads) return nullptr;
  PyObject* seen = known ? PyBytes_FromStringAndSize(chars(layouts), size(layouts)) : Py_BuildValue("");
  return Py_BuildValue("(NNN)", grads, PyByteArray_FromStringAndSize(chars(addresses), size(addresses)), seen);
}

// identities(lists and dicts) -> for each its size, and the addresses of its items, or keys and values but for dicts
PyObject* identities(PyObject*, PyObject* containers) {
  Words found;
  const auto add = [&](PyObject* object) { found.push_back(reinterpret_cast<int64_t>(object)); };
  for (Py_ssize_t j = 0, n = PyList_Size(containers); j < n; ++j) {
    PyObject* container = PyList_GetItem(containers, j);
    found.push_back(PyObject_Size(container));
    Py_ssize_t i = 0;
    PyObject *key, *value;
    if (PyDict_Check(container))
      while (PyDict_Next(container, &i, &key, &value)) {
        add(key);
        if (!PyDict_Check(value)) add(value);
      }
    else
      for (const Py_ssize_t items = PyList_Size(container); i < items; ++i) add(PyList_GetItem(container, i));
  }
  return PyErr_Occurred() ? nullptr : PyBytes_FromStringAndSize(chars(found), size(found));
}

PyMethodDef methods[] = {{"look", look, METH_O, nullptr},
                         {"identities", identities, METH_O, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

// torch's function that describes a tensor, or null with an exception.
DLPackDLTensorFromPyObjectNoSync find_describe() {
  PyObject* torch = PyImport_ImportModule("torch");
  PyObject* nn = torch ? PyObject_GetAttrString(torch, "nn") : nullptr;
  parameter_type = nn ? PyObject_GetAttrString(nn, "Parameter") : nullptr;
  tensor_type = parameter_type ? PyObject_GetAttrString(torch, "Tensor") : nullptr;
  PyObject* capsule = tensor_type ? PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__") : nullptr;
  auto* api = capsule ? static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api")) : nullptr;
  Py_XDECREF(torch), Py_XDECREF(nn), Py_XDECREF(capsule);  // torch keeps the table as long as the process runs
  const bool known = api && api->header.version.major == DLPACK_MAJOR_VERSION && api->dltensor_from_py_object_no_sync;
  // Whatever is missing: as any module that cannot be imported, this one is then done without.
  if (!known) PyErr_SetString(PyExc_ImportError, "torch's DLPack functions are of another version, or not there");
  return known ? api->dltensor_from_py_object_no_sync : nullptr;
}

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  describe = find_describe();
  return describe ? PyModule_Create(&definition) : nullptr;
}
