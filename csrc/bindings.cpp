// The compiled module `adajudge_kernels._native`: the kernels' calls as Python functions of tensors, whose shapes who calls
// has checked. Tensors are read as DLPack says, so that no symbol of torch's is needed. The interpreter's lock is released
// while a kernel runs on the CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string_view>
#include <variant>
#include <vector>

#include "cpu/dtypes.h"
#include "dlpack.h"
#include "kernels.h"

namespace py = pybind11;
using namespace adajudge;

namespace {

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

// What reads torch's tensors, and the types that are tensors and nothing more; `show_tensors` sets them.
const dlpack::Interface* interface = nullptr;
std::vector<PyTypeObject*> tensor_types;

bool plain(py::handle object) { return std::ranges::find(tensor_types, Py_TYPE(object.ptr())) != tensor_types.end(); }

// A tensor as it lies, or none. It keeps the tensor.
class Tensor {
public:
    Tensor() = default;
    explicit Tensor(py::object object) : object_(std::move(object)) {
        if (!interface) throw std::runtime_error("the module was not told how to read tensors: call show_tensors");
        if (interface->view(object_.ptr(), &view_) != 0) throw py::error_already_set();
        if (!view_.data && numel()) throw py::value_error("a tensor without its numbers came: they were freed, or never were");
    }

    explicit operator bool() const { return static_cast<bool>(object_); }
    void* data() const { return view_.data ? static_cast<char*>(view_.data) + view_.offset : nullptr; }
    operator void*() const { return data(); }
    int dimensions() const { return view_.dimensions; }
    int64_t size(int dimension) const { return view_.shape[dimension]; }
    int64_t stride(int dimension) const { return view_.strides[dimension]; }
    int64_t numel() const {
        int64_t product = 1;
        for (int i = 0; i < dimensions(); ++i) product *= size(i);
        return product;
    }
    bool contiguous() const {
        int64_t step = 1;
        for (int i = dimensions(); i-- > 0; step *= size(i))
            if (size(i) != 1 && stride(i) != step) return numel() == 0;
        return true;
    }
    bool on_cuda() const { return EMULATED || view_.device_type == dlpack::CUDA; }
    bool beside(const Tensor& other) const {
        return view_.device_type == other.view_.device_type && view_.device == other.view_.device;
    }
    bool floating() const { return view_.code == dlpack::FLOAT || view_.code == dlpack::BFLOAT; }
    Dtype dtype() const {
        if (!floating()) throw py::type_error("a tensor of floating point numbers was expected");
        if (view_.code == dlpack::BFLOAT) return Dtype::bfloat16;
        return view_.bits == 64 ? Dtype::float64 : view_.bits == 32 ? Dtype::float32 : Dtype::float16;
    }
    bool fp64() const { return dtype() == Dtype::float64; }
    template <class T>
    const T* integers() const {
        if (view_.code != dlpack::INTEGER || view_.bits != 8 * sizeof(T))
            throw py::type_error("a table of other integers was expected");
        return static_cast<const T*>(data());
    }
    Tensor call(const char* method) const { return Tensor(object_.attr(method)()); }

private:
    py::object object_;
    dlpack::Tensor view_{};
};

// A tensor that a kernel writes, or a table: its numbers must lie one after another.
struct Fixed : Tensor {
    Fixed() = default;
    explicit Fixed(py::object object) : Tensor(std::move(object)) {
        if (!contiguous()) throw py::value_error("a contiguous tensor was expected");
    }
};

// A tensor that a kernel reads. Where its numbers do not lie one after another, and on CUDA from a multiple of sixteen bytes
// on, they are copied.
struct Input : Tensor {
    Input() = default;
    explicit Input(Tensor tensor) : Tensor(std::move(tensor)) {
        if (!contiguous()) static_cast<Tensor&>(*this) = call("contiguous");
        const auto address = reinterpret_cast<std::uintptr_t>(data());
        if (on_cuda() && address % 16) static_cast<Tensor&>(*this) = call("clone");
    }
    explicit Input(py::object object) : Input(Tensor(std::move(object))) {}

    // In the precision of the kernels' arithmetic.
    Input in_arithmetic(bool fp64) const {
        return dtype() == (fp64 ? Dtype::float64 : Dtype::float32) ? *this : Input(call(fp64 ? "double" : "float"));
    }
};

// Numbers of heads [.., .., e]: those of a head lie one after another.
struct Heads : Tensor {
    Heads() = default;
    explicit Heads(py::object object) : Tensor(std::move(object)) {
        if (stride(2) != 1) static_cast<Tensor&>(*this) = call("contiguous");
    }
};

std::vector<void*> addresses(const auto& list) { return {list.begin(), list.end()}; }

// Where a call runs: on so many threads of the CPU, or on a stream of the current CUDA device.
using Where = std::variant<int, cuda::Stream>;

// A small argument in the precision of the kernels' arithmetic. Where they run on the CPU it is widened here, which a call
// of torch's would take longer for than many a kernel.
class Small {
public:
    Small(const Where& where, const Input& given, bool fp64) {
        if (!given) return;
        const Dtype dtype = given.dtype();
        const bool halves = dtype == Dtype::bfloat16 || dtype == Dtype::float16;
        if (fp64 || !halves || !std::holds_alternative<int>(where)) {
            kept_ = given.in_arithmetic(fp64);
            data_ = kept_;
            return;
        }
        widened_.resize(given.numel());
        data_ = widened_.data();
        with_dtype(dtype, [&](auto type) {
            using T = typename decltype(type)::type;
            const auto* from = static_cast<const T*>(given.data());
            if constexpr (sizeof(T) == 2)
                for_lanes(0, given.numel(), [&](int64_t j, auto n) { store(&widened_[j], load(from + j, n), n); });
        });
    }
    Small(const Small&) = delete;
    Small& operator=(const Small&) = delete;
    operator const real*() const { return data_; }

private:
    Input kept_;
    std::vector<float> widened_;
    const real* data_ = nullptr;
};

// In Python: a tensor, or None for a default one.
template <class T>
struct FromPython {
    PYBIND11_TYPE_CASTER(T, py::detail::const_name("Tensor"));
    bool load(py::handle source, bool) {
        if (!source.is_none()) value = T(py::reinterpret_borrow<py::object>(source));
        return true;
    }
};

}  // namespace

namespace pybind11::detail {
template <>
struct type_caster<Input> : FromPython<Input> {};
template <>
struct type_caster<Fixed> : FromPython<Fixed> {};
template <>
struct type_caster<Heads> : FromPython<Heads> {};
}  // namespace pybind11::detail

namespace {

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

// The tables of a layout, which it keeps. They are read at every use: torch moves a tensor's numbers when it is shared with
// another process.
class Tables {
public:
    explicit Tables(std::array<py::object, 5> tables) : tables_(std::move(tables)) {}

    const py::object& roles() const { return tables_[0]; }
    const py::object& sequences() const { return tables_[1]; }
    operator Layout() const {
        const Fixed roles(tables_[0]), sequences(tables_[1]), chunks(tables_[2]), groups(tables_[3]), group_chunks(tables_[4]);
        return {roles.integers<int8_t>(), sequences.integers<int32_t>(), chunks.integers<int32_t>(),
                groups.integers<int32_t>(), group_chunks.integers<int32_t>(),
                roles.size(0), sequences.size(0), chunks.size(0), groups.size(0), group_chunks.size(0)};
    }

private:
    std::array<py::object, 5> tables_;
};

// What the arguments of an operation on a layout must be, a word for each and in it a letter for each dimension: T and B are
// the layout's, every other letter is one size wherever it stands (K and d within their limits), 1 is 1. "K*Td" is a list or
// tuple of K tensors of one dtype. All are tensors of floating point numbers on the layout's device, of 64 bits if the
// first is.
class Form {
public:
    Form(const Tables& layout, std::string_view form) : roles_(layout.roles()), form_(form) {
        sizes_['T'] = roles_.size(0), sizes_['B'] = Tensor(layout.sequences()).size(0), sizes_['1'] = 1;
    }

    bool fits(const py::args& arguments) {
        for (py::handle argument : arguments) {
            const std::size_t end = std::min(form_.find(' '), form_.size());
            const std::string_view word = form_.substr(0, end);
            form_.remove_prefix(std::min(end + 1, form_.size()));
            if (word.find('*') == 1 ? !several(argument.ptr(), word) : !one(argument, word)) return false;
        }
        return form_.empty();
    }

private:
    bool several(PyObject* list, std::string_view word) {
        if (!PyList_CheckExact(list) && !PyTuple_CheckExact(list)) return false;
        const int64_t count = PySequence_Fast_GET_SIZE(list);
        if (!is(word[0], count)) return false;
        std::optional<Dtype> dtype;
        for (int64_t k = 0; k < count; ++k)
            if (!one(PySequence_Fast_GET_ITEM(list, k), word.substr(2), &dtype)) return false;
        return true;
    }
    // `dtype`: of those before in its list, which this one must have too.
    bool one(py::handle object, std::string_view word, std::optional<Dtype>* dtype = nullptr) {
        if (!plain(object)) return false;
        const Tensor tensor(py::reinterpret_borrow<py::object>(object));
        if (!tensor.floating() || !tensor.beside(roles_)) return false;
        if (tensor.dimensions() != std::ssize(word)) return false;
        for (int i = 0; i < tensor.dimensions(); ++i)
            if (!is(word[i], tensor.size(i))) return false;
        if (dtype && dtype->value_or(tensor.dtype()) != tensor.dtype()) return false;
        if (dtype) *dtype = tensor.dtype();
        if (!fp64_) fp64_ = tensor.fp64();
        return *fp64_ == tensor.fp64();
    }
    bool is(char letter, int64_t size) {
        std::optional<int64_t>& known = sizes_.at(letter);
        if (!known && size >= 1 && size <= (letter == 'K' ? MAX_DEPTHS : MAX_FEATURES)) known = size;
        return known == size;
    }

    const Tensor roles_;
    std::string_view form_;
    std::array<std::optional<int64_t>, 128> sizes_;  // by letter
    std::optional<bool> fp64_;
};

bool fit(const Tables& layout, std::string_view form, const py::args& arguments) {
    if (!plain(layout.roles()) || !plain(layout.sequences())) return false;
    try {
        return Form(layout, form).fits(arguments);
    } catch (const py::error_already_set&) {  // a tensor that cannot be read
    } catch (const py::builtin_exception&) {
    }
    return false;
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

void define_tensors(py::module_& m) {
    m.def("show_tensors", [](const py::capsule& capsule, const std::vector<py::type>& types) {
        const auto* found = static_cast<const dlpack::Interface*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::CAPSULE));
        if (!found) throw py::error_already_set();
        while (found && found->major != dlpack::MAJOR_VERSION) found = found->older;
        if (!found || !found->view) throw std::runtime_error("they do not follow DLPack 1");
        interface = found;
        for (const py::type& type : types) tensor_types.push_back(reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr()));
    }, py::arg("capsule"), py::arg("types"),
       "Say how tensors are read, by the `__dlpack_c_exchange_api__` of their type, and which types are nothing but tensors.");
    m.def("fit", &fit, py::arg("layout"), py::arg("form"), "Whether the arguments that follow are what the form says.");
}

void define_cuda(py::module_& m) {
    m.attr("with_cuda") = WITH_CUDA;
    m.attr("cuda_code") = CUDA_CODE;
    m.attr("emulated") = EMULATED;
    const auto stream = [](std::uintptr_t handle, py::function memory) {
        return cuda::Stream{reinterpret_cast<void*>(handle), [=](std::size_t size) {
            return reinterpret_cast<void*>(memory(size).cast<std::uintptr_t>());
        }};
    };
    py::class_<cuda::Stream>(m, "Stream", "A CUDA stream, and who gives device memory: a function of its size, to an address.")
        .def(py::init(stream), py::arg("handle"), py::arg("memory"));
}

void define_pooling(py::module_& m) {
    py::class_<Tables>(m, "Layout", "What adajudge_kernels.tables.LayoutTables holds, in its order.")
        .def(py::init<std::array<py::object, 5>>(), py::arg("tables"));
    m.def("means", [](const Where& where, const Tables& layout, const Input& hidden, const Fixed& prompt,
                      const Fixed& response, const Fixed& all) {
        const Means call{hidden.dtype(), 1, layout, hidden.size(1), hidden, prompt, response, all};
        run(where, call, ON_CPU(means), ON_CUDA(means));
    });
    m.def("spread_means", [](const Where& where, const Tables& layout, const Input& prompt, const Input& response,
                             const Input& all, const Fixed& grad_hidden) {
        const SpreadMeans call{grad_hidden.dtype(), 1, layout, grad_hidden.size(1), prompt, response, all, grad_hidden};
        run(where, call, ON_CPU(spread_means), ON_CUDA(spread_means));
    });
    m.def("depth_weights", [](const Where& where, const Input& context, const Input& weight, const Input& bias,
                              const Fixed& alpha) {
        const Small weights(where, weight, alpha.fp64()), biases(where, bias, alpha.fp64());
        const DepthWeights call{alpha.dtype(), alpha.size(0), context.size(1), alpha.size(1), context, weights, biases,
                                alpha};
        run(where, call, ON_CPU(depth_weights), ON_CUDA(depth_weights));
    });
    m.def("views", [](const Where& where, const Tables& layout, bool response_only, const std::vector<Input>& states,
                      const Input& alpha, const Input& weight, const Input& bias, const Fixed& last, const Fixed& mean,
                      const Fixed& attention, const Fixed& log_sum_exp) {
        const std::vector<void*> from = addresses(states);
        const bool fp64 = attention.fp64();
        const Small alphas(where, alpha, fp64), weights(where, weight, fp64), biases(where, bias, fp64);
        const Views call{states.at(0).dtype(), 1, layout, attention.size(1), std::ssize(from), response_only,
                         from.data(), alphas, weights, biases, last, mean, attention, log_sum_exp};
        run(where, call, ON_CPU(views), ON_CUDA(views));
    });
    m.def("views_backward", [](const Where& where, const Tables& layout, bool response_only, const Input& grad_last,
                               const Input& grad_mean, const Input& grad_attention, const std::vector<Input>& states,
                               const Input& alpha, const Input& weight, const Input& bias, const Input& attention,
                               const Input& log_sum_exp, const std::vector<Fixed>& grad_states, const Fixed& grad_alpha,
                               const Fixed& grad_weight) {
        const std::vector<void*> from = addresses(states), to = addresses(grad_states);
        const bool fp64 = attention.fp64();
        const Small alphas(where, alpha, fp64), weights(where, weight, fp64), biases(where, bias, fp64);
        const ViewsBackward call{states.at(0).dtype(), 1, layout, attention.size(1), std::ssize(from), response_only,
                                 grad_last, grad_mean, grad_attention, from.data(), alphas, weights, biases,
                                 attention, log_sum_exp, to.data(), grad_alpha, grad_weight};
        run(where, call, ON_CPU(views_backward), ON_CUDA(views_backward));
    });
}

void define_refinement(py::module_& m) {
    m.def("rms_norm", [](const Where& where, double eps, const Input& x, const Input& update, const Input& weight,
                         const Fixed& total, const Fixed& normed) {
        const Small weights(where, weight, x.fp64());
        const RmsNorm call{x.dtype(), 1, x.size(0), x.size(1), eps, x, update, weights, total, normed};
        run(where, call, ON_CPU(rms_norm), nullptr);
    });
    m.def("rms_norm_backward", [](const Where& where, double eps, const Input& grad_total, const Input& grad_normed,
                                  const Input& total, const Input& weight, const Fixed& grad, const Fixed& grad_weight) {
        const Small weights(where, weight, total.fp64());
        const RmsNormBackward call{total.dtype(), 1, total.size(0), total.size(1), eps, grad_total, grad_normed, total,
                                   weights, grad, grad_weight};
        run(where, call, ON_CPU(rms_norm_backward), nullptr);
    });
    m.def("swiglu", [](const Where& where, const Input& gate_up, const Fixed& out) {
        const Swiglu call{out.dtype(), 1, out.size(0), out.size(1), gate_up, out};
        run(where, call, ON_CPU(swiglu), nullptr);
    });
    m.def("swiglu_backward", [](const Where& where, const Input& grad, const Input& gate_up, const Fixed& grad_gate_up) {
        const SwigluBackward call{grad.dtype(), 1, grad.size(0), grad.size(1), grad, gate_up, grad_gate_up};
        run(where, call, ON_CPU(swiglu_backward), nullptr);
    });
    m.def("attention", [](const Where& where, bool causal, double scale, const Fixed& groups, const Fixed& queries,
                          const Fixed& query_chunks, const Fixed& rows, const Heads& query, const Heads& key,
                          const Heads& value, const Fixed& out) {
        const Attention call{query.dtype(), 1, query.size(1), key.size(1), query.size(2), causal, scale,
                             groups.integers<int32_t>(), queries.integers<int32_t>(), query_chunks.integers<int32_t>(),
                             rows.numel() ? rows.integers<int64_t>() : nullptr, query_chunks.size(0),
                             query, query.stride(0), query.stride(1), key, key.stride(0), key.stride(1),
                             value, value.stride(0), value.stride(1), out};
        run(where, call, ON_CPU(attention), nullptr);
    });
}

// The eight of adajudge_kernels.ExpertWeights, in its order.
using ExpertWeights = std::array<Input, 8>;

// body(Experts without its outputs)
template <class Body>
void with_experts(const Where& where, const std::array<Input, 4>& given, const ExpertWeights& weights, bool fp64,
                  Body body) {
    const auto& [view_in, view_in_bias, view_out, view_out_bias, router_in, router_in_bias, router_out, router_out_bias] =
        weights;
    const Input views[] = {given[0].in_arithmetic(fp64), given[1].in_arithmetic(fp64), given[2].in_arithmetic(fp64),
                           given[3].in_arithmetic(fp64)};
    const Small small[] = {{where, view_in_bias, fp64}, {where, view_out, fp64}, {where, view_out_bias, fp64},
                           {where, router_in_bias, fp64}, {where, router_out, fp64}, {where, router_out_bias, fp64}};
    body(Experts{fp64, 1, views[0].size(0), views[0].size(1), view_in.size(1), router_in.size(0),
                 {views[0], views[1], views[2], views[3]}, {view_in.dtype(), view_in}, {router_in.dtype(), router_in},
                 small[0], small[1], small[2], small[3], small[4], small[5], nullptr, nullptr, nullptr});
}

void define_experts(py::module_& m) {
    m.def("experts", [](const Where& where, const std::array<Input, 4>& views, const ExpertWeights& weights,
                        const Fixed& reward, const Fixed& scores, const Fixed& pi) {
        with_experts(where, views, weights, reward.fp64(), [&](Experts call) {
            call.reward = reward, call.scores = scores, call.pi = pi;
            run(where, call, ON_CPU(experts), ON_CUDA(experts));
        });
    });
    // The gradients of the weights in their order; those of the large ones in their dtypes.
    m.def("experts_backward", [](const Where& where, const std::array<Input, 4>& views, const ExpertWeights& weights,
                                 const Input& grad_reward, const Input& grad_scores, const Input& grad_pi,
                                 const std::array<Fixed, 4>& to_views, const std::array<Fixed, 8>& to) {
        const bool fp64 = to_views[0].fp64();
        const Input reward = grad_reward.in_arithmetic(fp64), scores = grad_scores.in_arithmetic(fp64);
        const Input pi = grad_pi.in_arithmetic(fp64);
        with_experts(where, views, weights, fp64, [&](const Experts& forward) {
            const ExpertsBackward call{forward, reward, scores, pi, {to_views[0], to_views[1], to_views[2], to_views[3]},
                                       to[0], to[4], to[1], to[2], to[3], to[5], to[6], to[7]};
            run(where, call, ON_CPU(experts_backward), ON_CUDA(experts_backward));
        });
    });
}

void define_loss(py::module_& m) {
    m.def("loss", [](const Where& where, double gamma, double temperature, double entropy_floor, double entropy_weight,
                     const Input& chosen, const Input& rejected, const Input& pair_weight, const Input& view_weights,
                     const Fixed& out, const Fixed& grad_chosen, const Fixed& grad_pair_weight,
                     const Fixed& grad_view_weights) {
        const bool fp64 = out.fp64();
        const Small rewards(where, chosen, fp64), others(where, rejected, fp64);
        const Small of_pairs(where, pair_weight, fp64), of_views(where, view_weights, fp64);
        const Loss call{fp64, 1, chosen.size(0), view_weights ? view_weights.size(0) : 0, gamma, temperature, entropy_floor,
                        entropy_weight, rewards, others, of_pairs, of_views, out, grad_chosen, grad_pair_weight,
                        grad_view_weights};
        run(where, call, ON_CPU(loss), ON_CUDA(loss));
    });
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Compiled kernels of adajudge_kernels; called by its native.py files.";
#if !defined(ADAJUDGE_EMULATED)
    define_levels(m);
#endif
    m.def("environment", [](const char* name) -> py::object {
        const char* value = std::getenv(name);
        return value ? py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(value)) : py::none();
    }, py::arg("name"), "An environment variable's value, None where it is not set.");
    define_tensors(m);
    define_cuda(m);
    define_pooling(m);
    define_refinement(m);
    define_experts(m);
    define_loss(m);
}
