// How emulated kernels run, and what went wrong.
#pragma once

#include <string>

namespace emulation {

enum class Schedule {
    forward,   // the first thread that can run: the first warp runs ahead as far as barriers let it; copies arrive at once
    backward,  // the last one; copies arrive when no thread can go on without them
    random,
};

// What the device says of itself: the first digit of its compute capability, and shared memory.
struct Device {
    int capability, most_shared_bytes;
};
constexpr Device AMPERE{8, 163 << 10}, HOPPER{9, 227 << 10};

void use_device(const Device& device);

void use_schedule(Schedule schedule, unsigned seed);
// Why the last launch failed.
const std::string& failure();

}  // namespace emulation
