// Whether a device can run the kernels of this extension.
#pragma once

#include <string>

namespace longshadow {

// Empty where it can, otherwise the CUDA runtime's reason: a driver too old, no kernel for its architecture.
std::string device_error(int device);

}  // namespace longshadow
