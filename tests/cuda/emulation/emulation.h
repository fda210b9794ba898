// How emulated kernels run, and what went wrong.
#pragma once

#include <string>

namespace emulation {

enum class Schedule {
    forward,   // the first thread that can run: the first warp runs ahead as far as barriers let it
    backward,  // the last one
    random,
};

void use_schedule(Schedule schedule, unsigned seed);
// Why the last launch failed.
const std::string& failure();

}  // namespace emulation
