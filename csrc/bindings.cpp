// The compiled module `adajudge_kernels._native`: the kernels' calls as Python functions. Tensors come as addresses
// (integers, 0 for none); who calls has checked them. The interpreter's lock is released while a kernel runs on the CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <variant>
#include <vector>

#include "cpu/dtypes.h"
#include "kernels.h"

namespace py = pybind11;
using namespace adajudge;

namespace {

using Address = std::uintptr_t;

void* at(Address address) { return reinterpret_cast<void*>(address); }

std::vector<void*> at(const std::vector<Address>& addresses) {
    std::vector<void*> pointers;
    for (Address address : addresses) pointers.push_back(at(address));
    return pointers;
}

// Where a call runs: on so many threads of the CPU, or on a stream of the current CUDA device.
using Where = std::variant<int, cuda::Stream>;

// A small argument as it is stored: dtype, address, how many numbers; or none.
using Given = std::optional<std::tuple<Dtype, Address, int64_t>>;

// A small argument in the precision of the kernels' arithmetic. Where they run on the CPU it is widened here, which a
// call of torch's would take longer for than many a kernel.
class Small {
public:
    Small(const Where& where, const Given& given) {
        if (!given) return;
        const auto [dtype, address, count] = *given;
        data_ = at(address);
        if (dtype == Dtype::float64 || dtype == Dtype::float32) return;
        if (!std::holds_alternative<int>(where)) throw py::value_error("a small argument of 16 bits, on a CUDA device");
        widened_.resize(count);
        with_dtype(dtype, [&, from = data_](auto type) {
            using T = typename decltype(type)::type;
            if constexpr (sizeof(T) == 2)
                for_lanes(0, count, [&](int64_t j, auto n) { store(&widened_[j], load(static_cast<const T*>(from) + j, n), n); });
        });
        data_ = widened_.data();
    }
    Small(const Small&) = delete;
    Small& operator=(const Small&) = delete;
    operator const real*() const { return data_; }

private:
    std::vector<float> widened_;
    const real* data_ = nullptr;
};

#if defined(ADAJUDGE_WITH_CUDA)  // a string: the code that the kernels were compiled to, "sm_80;sm_90;compute_90"
#define ON_CUDA(name) cuda::name
constexpr bool WITH_CUDA = true;
constexpr const char* CUDA_CODE = ADAJUDGE_WITH_CUDA;
#else
#define ON_CUDA(name) nullptr
constexpr bool WITH_CUDA = false;
constexpr const char* CUDA_CODE = "";
#endif
#if defined(ADAJUDGE_EMULATED)  // tests: the CUDA kernels run on the CPU, on its memory, and there are no others
#define ON_CPU(name) nullptr
constexpr bool EMULATED = true;
#else
#define ON_CPU(name) name
constexpr bool EMULATED = false;
#endif

template <class Call>
using OnCpu = void (*)(const Call&);
template <class Call>
using OnCuda = void (*)(const Call&, const cuda::Stream&);

template <class Call>
void run(const Where& where, Call call, std::type_identity_t<OnCpu<Call>> on_cpu,
         std::type_identity_t<OnCuda<Call>> on_cuda) {
    if (const int* threads = std::get_if<int>(&where)) {
        if constexpr (requires { call.threads; }) call.threads = *threads;
        if constexpr (requires { call.forward; }) call.forward.threads = *threads;
        py::gil_scoped_release unlocked;
        return on_cpu(call);
    }
    if (!on_cuda) throw std::runtime_error("this module was built without a CUDA kernel for the call");
    on_cuda(call, std::get<cuda::Stream>(where));
}

Layout layout_at(Address roles, Address sequences, Address chunks, Address groups, Address group_chunks, int64_t num_tokens,
                 int64_t num_sequences, int64_t num_chunks, int64_t num_groups, int64_t num_group_chunks) {
    return {static_cast<const int8_t*>(at(roles)),
            static_cast<const int32_t*>(at(sequences)),
            static_cast<const int32_t*>(at(chunks)),
            static_cast<const int32_t*>(at(groups)),
            static_cast<const int32_t*>(at(group_chunks)),
            num_tokens, num_sequences, num_chunks, num_groups, num_group_chunks};
}

#if !defined(ADAJUDGE_EMULATED)
void define_levels(py::module_& m) {
    m.def("level", &level, "The instruction set in use.");
    m.def("levels", [] {
        std::vector<std::string> names;
        for (const char* const* name = levels(); *name; ++name) names.emplace_back(*name);
        return names;
    }, "The instruction sets that this processor has, the fastest first.");
    m.def("use_level", [](const std::string& name) {
        if (!use_level(name.c_str())) throw py::value_error("this processor has no " + name);
    }, py::arg("name"), "Run on another instruction set.");
}
#endif

void define_cuda(py::module_& m) {
    m.attr("with_cuda") = WITH_CUDA;
    m.attr("cuda_code") = CUDA_CODE;
    m.attr("emulated") = EMULATED;
    const auto stream = [](Address handle, py::function memory) {
        return cuda::Stream{at(handle), [=](std::size_t size) { return at(memory(size).cast<Address>()); }};
    };
    py::class_<cuda::Stream>(m, "Stream", "A CUDA stream, and who gives device memory: a function of its size, to an address.")
        .def(py::init(stream), py::arg("handle"), py::arg("memory"));
}

void define_pooling(py::module_& m) {
    py::class_<Layout>(m, "Layout", "Addresses and sizes of adajudge_kernels.tables.LayoutTables.")
        .def(py::init(&layout_at), py::arg("roles"), py::arg("sequences"), py::arg("chunks"), py::arg("groups"),
             py::arg("group_chunks"), py::arg("num_tokens"), py::arg("num_sequences"), py::arg("num_chunks"),
             py::arg("num_groups"), py::arg("num_group_chunks"));
    m.def("means", [](const Where& where, Dtype dtype, const Layout& layout, int64_t features, Address hidden, Address prompt,
                      Address response, Address all) {
        const Means call{dtype, 1, layout, features, at(hidden), at(prompt), at(response), at(all)};
        run(where, call, ON_CPU(means), ON_CUDA(means));
    });
    m.def("spread_means", [](const Where& where, Dtype dtype, const Layout& layout, int64_t features, Address prompt,
                             Address response, Address all, Address grad_hidden) {
        const SpreadMeans call{dtype, 1, layout, features, at(prompt), at(response), at(all), at(grad_hidden)};
        run(where, call, ON_CPU(spread_means), ON_CUDA(spread_means));
    });
    m.def("depth_weights", [](const Where& where, Dtype dtype, int64_t num_sequences, int64_t features, int64_t depths, Address context,
                              const Given& weight, const Given& bias, Address alpha) {
        const Small weights(where, weight), biases(where, bias);
        const DepthWeights call{dtype, num_sequences, features, depths, at(context), weights, biases, at(alpha)};
        run(where, call, ON_CPU(depth_weights), ON_CUDA(depth_weights));
    });
    m.def("views", [](const Where& where, Dtype dtype, const Layout& layout, int64_t features, bool response_only,
                      const std::vector<Address>& states, const Given& alpha, const Given& weight, const Given& bias,
                      Address last, Address mean, Address attention, Address log_sum_exp) {
        const std::vector<void*> pointers = at(states);
        const Small alphas(where, alpha), weights(where, weight), biases(where, bias);
        const Views call{dtype, 1, layout, features, static_cast<int64_t>(pointers.size()), response_only,
                         pointers.data(), alphas, weights, biases, at(last), at(mean), at(attention), at(log_sum_exp)};
        run(where, call, ON_CPU(views), ON_CUDA(views));
    });
    m.def("views_backward", [](const Where& where, Dtype dtype, const Layout& layout, int64_t features, bool response_only,
                               Address grad_last, Address grad_mean, Address grad_attention,
                               const std::vector<Address>& states, const Given& alpha, const Given& weight,
                               const Given& bias, Address attention, Address log_sum_exp,
                               const std::vector<Address>& grad_states, Address grad_alpha, Address grad_weight) {
        const std::vector<void*> from = at(states), to = at(grad_states);
        const Small alphas(where, alpha), weights(where, weight), biases(where, bias);
        const ViewsBackward call{dtype, 1, layout, features, static_cast<int64_t>(from.size()), response_only,
                                 at(grad_last), at(grad_mean), at(grad_attention), from.data(), alphas, weights, biases,
                                 at(attention), at(log_sum_exp), to.data(), at(grad_alpha), at(grad_weight)};
        run(where, call, ON_CPU(views_backward), ON_CUDA(views_backward));
    });
}

void define_refinement(py::module_& m) {
    m.def("rms_norm", [](const Where& where, Dtype dtype, int64_t rows, int64_t features, double eps, Address x, Address update,
                         const Given& weight, Address total, Address normed) {
        const Small weights(where, weight);
        const RmsNorm call{dtype, 1, rows, features, eps, at(x), at(update), weights, at(total), at(normed)};
        run(where, call, ON_CPU(rms_norm), nullptr);
    });
    m.def("rms_norm_backward", [](const Where& where, Dtype dtype, int64_t rows, int64_t features, double eps,
                                  Address grad_total, Address grad_normed, Address total, const Given& weight,
                                  Address grad, Address grad_weight) {
        const Small weights(where, weight);
        const RmsNormBackward call{dtype, 1, rows, features, eps, at(grad_total), at(grad_normed), at(total),
                                   weights, at(grad), at(grad_weight)};
        run(where, call, ON_CPU(rms_norm_backward), nullptr);
    });
    m.def("swiglu", [](const Where& where, Dtype dtype, int64_t rows, int64_t features, Address gate_up, Address out) {
        const Swiglu call{dtype, 1, rows, features, at(gate_up), at(out)};
        run(where, call, ON_CPU(swiglu), nullptr);
    });
    m.def("swiglu_backward", [](const Where& where, Dtype dtype, int64_t rows, int64_t features, Address grad, Address gate_up,
                                Address grad_gate_up) {
        const SwigluBackward call{dtype, 1, rows, features, at(grad), at(gate_up), at(grad_gate_up)};
        run(where, call, ON_CPU(swiglu_backward), nullptr);
    });
    // `query`, `key`, `value`: address, step from token to token, step from head to head.
    using Strided = std::array<int64_t, 3>;
    m.def("attention", [](const Where& where, Dtype dtype, int64_t heads, int64_t key_heads, int64_t head_size, bool causal,
                          double scale, Address groups, Address queries, Address query_chunks, Address rows,
                          int64_t num_query_chunks, const Strided& query, const Strided& key, const Strided& value,
                          Address out) {
        const auto table = [](Address address) { return static_cast<const int32_t*>(at(address)); };
        const auto from = [](const Strided& x) { return at(static_cast<Address>(x[0])); };
        const Attention call{dtype, 1, heads, key_heads, head_size, causal, scale,
                             table(groups), table(queries), table(query_chunks), static_cast<const int64_t*>(at(rows)),
                             num_query_chunks, from(query), query[1], query[2], from(key), key[1], key[2],
                             from(value), value[1], value[2], at(out)};
        run(where, call, ON_CPU(attention), nullptr);
    });
}

// Views, small weights, outputs: lists in the order of `Experts`.
struct GivenExperts {
    Experts call;  // without its small weights
    std::array<Given, 6> small;
};

GivenExperts experts_at(bool fp64, int64_t rows, int64_t features, int64_t view_units, int64_t router_units,
                        const std::array<Address, 4>& views, Dtype view_in_dtype, Address view_in, Dtype router_in_dtype,
                        Address router_in, const std::array<Given, 6>& small, const std::array<Address, 3>& outputs) {
    return {{fp64, 1, rows, features, view_units, router_units,
             {at(views[0]), at(views[1]), at(views[2]), at(views[3])},
             {view_in_dtype, at(view_in)}, {router_in_dtype, at(router_in)},
             nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
             at(outputs[0]), at(outputs[1]), at(outputs[2])}, small};
}

// body(Experts with its small weights)
template <class Body>
void with_small(const Where& where, const GivenExperts& given, Body body) {
    const auto& from = given.small;
    const Small small[] = {{where, from[0]}, {where, from[1]}, {where, from[2]}, {where, from[3]}, {where, from[4]}, {where, from[5]}};
    Experts call = given.call;
    call.view_in_bias = small[0], call.view_out = small[1], call.view_out_bias = small[2];
    call.router_in_bias = small[3], call.router_out = small[4], call.router_out_bias = small[5];
    body(call);
}

void define_experts(py::module_& m) {
    py::class_<GivenExperts>(m, "Experts", "Addresses and sizes of a gated expert combination.")
        .def(py::init(&experts_at), py::arg("fp64"), py::arg("rows"), py::arg("features"),
             py::arg("view_units"), py::arg("router_units"), py::arg("views"), py::arg("view_in_dtype"),
             py::arg("view_in"), py::arg("router_in_dtype"), py::arg("router_in"), py::arg("small"),
             py::arg("outputs"));
    m.def("experts", [](const Where& where, const GivenExperts& given) {
        with_small(where, given, [&](const Experts& call) { run(where, call, ON_CPU(experts), ON_CUDA(experts)); });
    });
    m.def("experts_backward", [](const Where& where, const GivenExperts& given, const std::array<Address, 3>& grads,
                                 const std::array<Address, 4>& views, Address view_in, Address router_in,
                                 const std::array<Address, 6>& small) {
        with_small(where, given, [&](const Experts& forward) {
            const ExpertsBackward call{forward, at(grads[0]), at(grads[1]), at(grads[2]),
                                       {at(views[0]), at(views[1]), at(views[2]), at(views[3])}, at(view_in), at(router_in),
                                       at(small[0]), at(small[1]), at(small[2]), at(small[3]), at(small[4]), at(small[5])};
            run(where, call, ON_CPU(experts_backward), ON_CUDA(experts_backward));
        });
    });
}

void define_loss(py::module_& m) {
    m.def("loss", [](const Where& where, bool fp64, int64_t pairs, int64_t sequences, double gamma, double temperature,
                     double entropy_floor, double entropy_weight, const Given& chosen, const Given& rejected,
                     const Given& pair_weight, const Given& view_weights, Address out, Address grad_chosen,
                     Address grad_pair_weight, Address grad_view_weights) {
        const Small rewards(where, chosen), others(where, rejected), of_pairs(where, pair_weight), of_views(where, view_weights);
        const Loss call{fp64, 1, pairs, sequences, gamma, temperature, entropy_floor, entropy_weight, rewards, others,
                        of_pairs, of_views, at(out), at(grad_chosen), at(grad_pair_weight), at(grad_view_weights)};
        run(where, call, ON_CPU(loss), ON_CUDA(loss));
    });
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Compiled kernels of adajudge_kernels; called by its native.py files.";
    py::enum_<Dtype>(m, "Dtype")
        .value("float64", Dtype::float64)
        .value("float32", Dtype::float32)
        .value("bfloat16", Dtype::bfloat16)
        .value("float16", Dtype::float16);
#if !defined(ADAJUDGE_EMULATED)
    define_levels(m);
#endif
    m.def("environment", [](const char* name) -> py::object {
        const char* value = std::getenv(name);
        return value ? py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(value)) : py::none();
    }, py::arg("name"), "An environment variable's value, None where it is not set.");
    define_cuda(m);
    define_pooling(m);
    define_refinement(m);
    define_experts(m);
    define_loss(m);
}
