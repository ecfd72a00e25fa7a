#pragma once

#include <Python.h>

// An empty Python module, so that `import vitfast._C` loads the library and with it the operators it registers.
#define VITFAST_PYTHON_MODULE(name)                                                                  \
    extern "C" __attribute__((visibility("default"))) PyObject* PyInit_##name() {                    \
        static PyModuleDef module = {                                                                \
            PyModuleDef_HEAD_INIT, #name, nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr}; \
        return PyModule_Create(&module);                                                             \
    }
