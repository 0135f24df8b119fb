// The Python module fastgpt._C: information about the build, and helpers that run on the host.
// The operations are not bound here: their files register them with PyTorch when this library loads.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "bench/peaks.h"
#include "common/cpu_level.h"
#include "common/pytorch_threads.h"
#include "decode_step/addresses.h"
#include "decode_step/plan.h"
#include "kv_cache/page_allocator.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

py::list split_words(const char* text) {
  std::istringstream stream(text);
  py::list list;
  for (std::string word; stream >> word;) list.append(word);
  return list;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = kCompiler;
  info["torch_target_version"] = std::to_string(TORCH_TARGET_VERSION >> 56) + "." +
      std::to_string(TORCH_TARGET_VERSION >> 48 & 0xff);
  info["cpu_levels"] = split_words(FASTGPT_CPU_LEVELS);
  info["cpu_level"] = fastgpt::cpu_level_name(fastgpt::cpu_level());
  info["cuda_archs"] = split_words(FASTGPT_CUDA_ARCHS);
  info["cuda_version"] = FASTGPT_CUDA_VERSION;
  return info;
}

py::dict cpu_features() {
  const fastgpt::CpuFeatures& features = fastgpt::cpu_features();
  py::dict result;
  result["amd"] = features.amd, result["avx512_bf16"] = features.avx512_bf16, result["avx512_fp16"] = features.avx512_fp16;
  return result;
}

using fastgpt::PageAllocator;

// Converts a Python integer (also NumPy's, but no bool). `name` begins the message of an error.
int64_t integer(const py::handle& value, const char* name) {
  const py::object index = PyBool_Check(value.ptr()) ? py::object()
                                                     : py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!index) {
    PyErr_Clear();
    throw py::type_error(std::string(name) + ": expected an integer, got " + Py_TYPE(value.ptr())->tp_name);
  }
  int overflow;
  const int64_t number = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow) throw py::value_error(std::string(name) + ": expected an integer of 64 bits, got a larger one");
  return number;
}

std::vector<int64_t> integers(const py::handle& values, const char* name) {
  if (!PySequence_Check(values.ptr()) || PyUnicode_Check(values.ptr()) || PyBytes_Check(values.ptr())) {
    throw py::type_error(std::string(name) + ": expected a list of integers, got " + Py_TYPE(values.ptr())->tp_name);
  }
  std::vector<int64_t> numbers;
  for (const py::handle& value : py::reinterpret_borrow<py::sequence>(values)) numbers.push_back(integer(value, name));
  return numbers;
}

// Wraps a method that takes one sequence for Python.
template <typename Result>
auto of_sequence(Result (PageAllocator::*method)(int64_t)) {
  return [method](PageAllocator& allocator, const py::object& sequence) {
    return (allocator.*method)(integer(sequence, "sequence"));
  };
}
template <typename Result>
auto of_sequence(Result (PageAllocator::*method)(int64_t) const) {
  return [method](const PageAllocator& allocator, const py::object& sequence) {
    return (allocator.*method)(integer(sequence, "sequence"));
  };
}

py::dict statistics(const PageAllocator& allocator) {
  const PageAllocator::Statistics numbers = allocator.statistics();
  py::dict result;
  result["num_pages"] = allocator.num_pages();
  result["page_size"] = allocator.page_size();
  result["used_pages"] = allocator.num_pages() - numbers.free_pages;
  result["free_pages"] = numbers.free_pages;
  result["shared_pages"] = numbers.shared_pages;
  result["sequences"] = numbers.sequences;
  result["tokens"] = numbers.tokens;
  return result;
}

// The state of an allocator, for pickle and copy.deepcopy.
py::tuple state_of(const PageAllocator& allocator) {
  py::list sequences;
  for (const auto& [number, sequence] : allocator.sequences()) {
    sequences.append(py::make_tuple(number, sequence.length, sequence.pages));
  }
  return py::make_tuple(
      allocator.num_pages(), allocator.page_size(), allocator.next_sequence(), allocator.free_pages(), sequences);
}

PageAllocator allocator_of(const py::tuple& state) {
  if (state.size() != 5) throw py::value_error("state: expected that of a PageAllocator");
  std::unordered_map<int64_t, PageAllocator::Sequence> sequences;
  for (const auto& item : state[4]) {
    const auto sequence = item.cast<py::tuple>();
    sequences[sequence[0].cast<int64_t>()] = {sequence[1].cast<int64_t>(), sequence[2].cast<std::vector<int64_t>>()};
  }
  return {
      state[0].cast<int64_t>(), state[1].cast<int64_t>(), state[2].cast<int64_t>(), state[3].cast<std::vector<int64_t>>(),
      std::move(sequences)};
}

void define_page_allocator(py::module_& module) {
  py::register_exception<fastgpt::OutOfPages>(module, "OutOfPages", PyExc_RuntimeError).doc() =
      "A paged cache has too few free pages for a step; nothing has changed.";

  py::class_<PageAllocator::Changes>(
      module, "PageChanges", "The changes that the caller of PageAllocator.append must apply, in order.")
      .def_readonly("copy_from", &PageAllocator::Changes::copy_from, "pages to copy ...")
      .def_readonly("copy_to", &PageAllocator::Changes::copy_to, "... and where to")
      .def_readonly("rows", &PageAllocator::Changes::rows, "block_table[row, column] = page; rows as in the call")
      .def_readonly("columns", &PageAllocator::Changes::columns)
      .def_readonly("pages", &PageAllocator::Changes::pages);

  py::class_<PageAllocator>(module, "PageAllocator", R"(Which sequence has which of `num_pages` pages of `page_size` tokens.

Sequences are numbers. Raises ValueError for one that is unknown or was freed.)")
      .def(
          py::init([](const py::object& num_pages, const py::object& page_size) {
            return std::make_unique<PageAllocator>(integer(num_pages, "num_pages"), integer(page_size, "page_size"));
          }),
          py::arg("num_pages"), py::arg("page_size"))
      .def("allocate", &PageAllocator::allocate, "Creates an empty sequence and returns its number. Numbers are never reused.")
      .def(
          "fork", of_sequence(&PageAllocator::fork), py::arg("sequence"),
          "Creates a sequence that shares the pages of another.")
      .def(
          "free", of_sequence(&PageAllocator::free), py::arg("sequence"),
          "Removes a sequence and frees the pages that no other shares.")
      .def(
          "append",
          [](PageAllocator& allocator, const py::object& sequences, const py::object& counts) {
            return allocator.append(integers(sequences, "sequences"), integers(counts, "counts"));
          },
          py::arg("sequences"), py::arg("counts"),
          R"(Reserves slots for counts[i] more tokens of sequences[i], which are distinct. Returns PageChanges.

A shared page that would be written is replaced by a copy (copy-on-write).
Raises OutOfPages before anything has changed.)")
      .def(
          "truncate",
          [](PageAllocator& allocator, const py::object& sequence, const py::object& length) {
            allocator.truncate(integer(sequence, "sequence"), integer(length, "length"));
          },
          py::arg("sequence"), py::arg("length"), "Removes all but the first `length` tokens.")
      .def("length", of_sequence(&PageAllocator::length), py::arg("sequence"), "The number of tokens of a sequence.")
      .def(
          "pages", of_sequence(&PageAllocator::pages), py::arg("sequence"),
          "The pages of a sequence, in the order of its tokens.")
      .def("statistics", &statistics, R"(A dict: num_pages, page_size, used_pages, free_pages, shared_pages (those of
several sequences), sequences, tokens (of all sequences; those in a shared page count for each).)")
      .def(py::pickle(&state_of, &allocator_of), "For pickle and copy.deepcopy.");
}

struct OneThread {};

void define_plan(py::module_& module) {
  py::class_<OneThread>(
      module, "OneThread",
      "A context in which PyTorch's operations on this thread use one thread: others would spin on the CPUs of a plan's "
      "threads.")
      .def(py::init<>())
      .def("__enter__", [](const OneThread&) { fastgpt::begin_one_thread(); })
      .def("__exit__", [](const OneThread&, const py::args&) { fastgpt::end_one_thread(); });

  using fastgpt::Plan;
  py::class_<Plan>(
      module, "Plan", "CPU operations, recorded to be replayed on the same tensors: see fastgpt/generation/replay.py.")
      .def(py::init<>())
      .def(
          "record", &Plan::record,
          "From now on this thread's operations are added to the plan. RuntimeError if another plan is being recorded.")
      .def("finish", &Plan::finish)
      .def("run", &Plan::run, py::call_guard<py::gil_scoped_release>())
      .def("__len__", &Plan::size);
}

// Guards of a recorded step of a model: Python dicts, such as those of modules, and addresses of tensors that must not change.
class Unchanged {
 public:
  using Attribute = std::pair<py::dict, py::str>;

  Unchanged(
      const std::vector<py::dict>& entries, const std::vector<py::dict>& counts, const std::vector<Attribute>& attributes) {
    dicts_.reserve(entries.size() + counts.size());
    for (const auto& dict : entries) {
      Dict kept{dict, PyDict_Size(dict.ptr()), {}};
      PyObject *key, *value;
      for (Py_ssize_t position = 0; PyDict_Next(dict.ptr(), &position, &key, &value);) {
        const auto object = py::reinterpret_borrow<py::object>(value);
        kept.values.emplace_back(object, py::type::of(object));
      }
      dicts_.push_back(std::move(kept));
    }
    for (const auto& dict : counts) dicts_.push_back({dict, PyDict_Size(dict.ptr()), {}});
    for (const auto& [dict, name] : attributes) attributes_.push_back({dict, name, dict[name]});
  }

  void watch() { addresses_.watch(); }
  void finish() { addresses_.finish(); }

  bool holds() const {
    for (const auto& kept : dicts_) {
      if (PyDict_Size(kept.dict.ptr()) != kept.count) return false;
      PyObject *key, *value;
      Py_ssize_t position = 0;
      for (const auto& [expected, type] : kept.values) {
        if (!PyDict_Next(kept.dict.ptr(), &position, &key, &value) || value != expected.ptr()) return false;
        if (reinterpret_cast<PyObject*>(Py_TYPE(value)) != type.ptr()) return false;
      }
    }
    for (const auto& [dict, name, value] : attributes_) {
      if (PyDict_GetItem(dict.ptr(), name.ptr()) != value.ptr()) return false;
    }
    return addresses_.hold();
  }

 private:
  struct Dict {
    py::dict dict;
    Py_ssize_t count;
    std::vector<std::pair<py::object, py::type>>
        values;  // owned, so that no new object gets their address; empty if only the number of keys counts
  };

  struct Value {
    py::dict dict;
    py::str name;
    py::object value;  // owned, likewise
  };

  std::vector<Dict> dicts_;
  std::vector<Value> attributes_;
  fastgpt::Addresses addresses_;
};

void define_unchanged(py::module_& module) {
  py::class_<Unchanged>(module, "Unchanged", "Guards of a recorded step of a model: see fastgpt/generation/replay.py.")
      .def(
          py::init<const std::vector<py::dict>&, const std::vector<py::dict>&, const std::vector<Unchanged::Attribute>&>(),
          py::arg("entries"), py::arg("counts"), py::arg("attributes"),
          R"(entries: dicts whose values must stay the same objects, of the same types (an assignment to __class__ changes these);
counts: dicts whose number of keys must stay the same; attributes: pairs of a dict and a key whose value must stay the same
object.)")
      .def(
          "watch", &Unchanged::watch,
          "From now on tensors that this thread passes to fastgpt::watch must keep their addresses.")
      .def("finish", &Unchanged::finish)
      .def("holds", &Unchanged::holds, "Whether all guards hold.");
}

void define_peaks(py::module_& module) {
  using fastgpt::Peak;
  py::class_<Peak>(
      module, "Peak",
      "A multiply-add instruction in a loop on registers, with `operations` multiplications and additions per iteration.")
      .def_readonly("name", &Peak::name)
      .def_readonly("operations", &Peak::operations)
      .def(
          "run", &fastgpt::run_on_all_threads, py::arg("iterations"), py::call_guard<py::gil_scoped_release>(),
          "Runs so many iterations in total on all of PyTorch's threads.");
  module.def(
      "read_memory",
      [](uintptr_t address, int64_t count) {
        return fastgpt::read_on_all_threads(reinterpret_cast<const float*>(address), count);
      },
      py::arg("address"), py::arg("count"), py::call_guard<py::gil_scoped_release>(),
      "The sum of `count` float32 numbers in memory, read by all of PyTorch's threads.");
  module.def(
      "peaks", &fastgpt::peaks, "A list of Peak: the instructions of the CPU level in use that this CPU has, float32's first.");
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("build_info", &build_info, R"(Information about this build, as a dict.

compiler: its name and version; torch_target_version: the oldest torch it loads on; cpu_levels:
the instruction sets compiled in; cpu_level: the one in use; cuda_archs: GPU architectures of
libfastgpt_cuda.so, [] if that was not built; cuda_version: of the nvcc that compiled it, like "13.0", "" likewise.

Raises ValueError if FASTGPT_CPU_LEVEL names a level that is unknown or that this CPU lacks.)");
  module.def(
      "cpu_features", &cpu_features,
      R"(CPU features, beyond its level, that decide which matrix product is fastest, as a dict of bool.

amd: whether AMD made it; avx512_bf16, avx512_fp16: whether it has these instructions.)");
  define_page_allocator(module);
  define_peaks(module);
  define_plan(module);
  define_unchanged(module);
}
