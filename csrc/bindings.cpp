// The extension module longshadow._C. Importing it registers the operators; beyond that it says what it was
// built for.
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <cuda_runtime_api.h>
#include <torch/headeronly/version.h>

#include "device.h"

namespace {

PyObject* device_error(PyObject*, PyObject* argument) {
  const long device = PyLong_AsLong(argument);
  if (PyErr_Occurred()) return nullptr;
  const std::string error = longshadow::device_error(static_cast<int>(device));
  if (error.empty()) Py_RETURN_NONE;
  return PyUnicode_FromString(error.c_str());
}

PyMethodDef methods[] = {
    {"device_error", device_error, METH_O,
     "Why the kernels cannot run on a CUDA device (its index), or None."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "longshadow._C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  if (PyModule_AddStringConstant(module, "TORCH_VERSION", TORCH_VERSION) < 0 ||
      PyModule_AddIntConstant(module, "CUDA_VERSION", CUDART_VERSION) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
