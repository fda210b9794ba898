// Where the cases run: instruction sets of this processor, and CUDA devices emulated, with several schedules of their threads.
#include "../cuda/emulation/emulation.h"
#include "testing.h"

namespace testing {
namespace {

struct Emulated {
    const char* name;
    emulation::Device device;
    emulation::Schedule schedule;
};

// Of compute capability 8.0, and of 9.0, which has a copy engine.
const Emulated DEVICES[] = {
    {"cuda80-forward", emulation::AMPERE, emulation::Schedule::forward},
    {"cuda80-backward", emulation::AMPERE, emulation::Schedule::backward},
    {"cuda80-random", emulation::AMPERE, emulation::Schedule::random},
    {"cuda90-forward", emulation::HOPPER, emulation::Schedule::forward},
    {"cuda90-backward", emulation::HOPPER, emulation::Schedule::backward},
    {"cuda90-random", emulation::HOPPER, emulation::Schedule::random},
};

bool on_cuda = false;

// Memory of the size that was asked for, so that AddressSanitizer sees what lies beyond; full of NaN.
class Memory {
public:
    void* take(std::size_t size) {
        Buffer& buffer = taken_.emplace_back(Dtype::float64, int64_t(size + 7) / 8);
        return buffer;
    }

private:
    std::vector<Buffer> taken_;
};

template <class Call>
void run(const Call& call, void (*on_cpu)(const Call&), void (*on_device)(const Call&, const adajudge::cuda::Stream&)) {
    if (!on_cuda) return on_cpu(call);
    if (!on_device) throw NotServed();
    Memory memory;
    on_device(call, {nullptr, [&](std::size_t size) { return memory.take(size); }});
}

}  // namespace

bool use_place(const std::string& name) {
    for (const Emulated& emulated : DEVICES)
        if (name == emulated.name) {
            emulation::use_device(emulated.device);
            emulation::use_schedule(emulated.schedule, 1);
            return on_cuda = true;
        }
    on_cuda = false;
    return adajudge::use_level(name.c_str());
}

std::vector<std::string> places() {
    std::vector<std::string> names;
    for (const char* const* level = adajudge::levels(); *level; ++level) names.push_back(*level);
    for (const Emulated& emulated : DEVICES) names.push_back(emulated.name);
    return names;
}

namespace on {

#define ON_BOTH(name, Call) \
    void name(const adajudge::Call& call) { run(call, adajudge::name, adajudge::cuda::name); }
#define ON_CPU(name, Call) \
    void name(const adajudge::Call& call) { run<adajudge::Call>(call, adajudge::name, nullptr); }
ADAJUDGE_CUDA_OPERATIONS(ON_BOTH)
ADAJUDGE_CPU_OPERATIONS(ON_CPU)

}  // namespace on
}  // namespace testing
