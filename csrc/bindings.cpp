// The only part of the extension that knows Python. Waits release the GIL and check for signals ten times a
// second; native objects hold no Python references.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <optional>

#include "arena.h"
#include "cuda_api.h"
#include "digest.h"
#include "image.h"
#include "reader.h"
#include "source_check.h"
#include "writer.h"

namespace py = pybind11;
using namespace roll;

namespace {

// Releases the GIL if this thread holds it, so that a destructor can use it too.
class GilReleased {
  public:
    GilReleased() {
        if (PyGILState_Check()) released_.emplace();
    }

  private:
    std::optional<py::gil_scoped_release> released_;
};

// A native object with threads or memory that only the process that created it has. In a forked child any use
// of it throws, and the destructor leaks it instead of joining threads that do not exist there.
template <class T>
class Owned {
  public:
    explicit Owned(std::shared_ptr<T> object) : object_(std::move(object)), pid_(getpid()) {}
    Owned(Owned&&) = default;
    Owned& operator=(Owned&&) = delete;
    ~Owned() {
        if (object_ && !in_owner_process()) leak();
    }
    bool in_owner_process() const { return getpid() == pid_; }
    void leak() { new std::shared_ptr<T>(std::move(object_)); }
    const std::shared_ptr<T>& get() const {
        if (!in_owner_process()) {
            throw std::runtime_error(
                "a forked child of process " + std::to_string(pid_) +
                " cannot use its parent's arena, mover or transfers: save in the parent");
        }
        return object_;
    }
    std::shared_ptr<T>& raw() { return object_; }

  private:
    std::shared_ptr<T> object_;
    pid_t pid_;
};

struct PyArena {
    Owned<Arena> arena;
    ~PyArena() {
        if (!arena.in_owner_process()) return;
        GilReleased released;  // unmapping and joining take time
        arena.raw().reset();
    }
};

// Drops one reference to a mover. The last one ends its threads; if one hangs in the operating system, the
// mover is leaked.
void release_mover(Owned<Mover>& mover) {
    if (!mover.in_owner_process()) return;
    GilReleased released;
    if (mover.raw().use_count() == 1 && !mover.raw()->shutdown(Clock::time_point::min())) mover.leak();
    mover.raw().reset();
}

struct PyMover {
    Owned<Mover> mover;
    ~PyMover() { release_mover(mover); }
};

struct PyTransfer {
    Owned<Transfer> transfer;
    Owned<Mover> mover;
    ~PyTransfer() {
        if (!transfer.in_owner_process()) return;
        {
            GilReleased released;
            // Nobody keeps the sources alive any more.
            if (!transfer.raw()->released()) transfer.raw()->abandon();
            transfer.raw().reset();
        }
        release_mover(mover);
    }
};

Clock::time_point deadline_after(std::optional<double> seconds) {
    if (!seconds || *seconds > 1e9) return Clock::time_point::max();
    if (std::isnan(*seconds)) throw std::invalid_argument("timeout is not a number");
    return Clock::now() + std::chrono::duration_cast<Clock::duration>(
                              std::chrono::duration<double>(std::max(0.0, *seconds)));
}

// Calls step(until) without the GIL until it returns true or the time is up; rethrows what a signal handler
// raised.
template <class Step>
bool wait_for(std::optional<double> timeout, Step step) {
    const auto deadline = deadline_after(timeout);
    for (;;) {
        bool done;
        {
            py::gil_scoped_release released;
            done = step(std::min(deadline, Clock::now() + std::chrono::milliseconds(100)));
        }
        if (done) return true;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        if (Clock::now() >= deadline) return false;
    }
}

// The `poll` of read_file and digest_file: true once a Python signal handler has raised.
bool signalled() {
    py::gil_scoped_acquire gil;
    return PyErr_CheckSignals() != 0;
}

// The bytes of any contiguous buffer, which is held during this object's lifetime.
class Bytes {
  public:
    explicit Bytes(const py::object& object) {
        if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) throw py::error_already_set();
    }
    ~Bytes() { PyBuffer_Release(&view_); }
    Bytes(const Bytes&) = delete;
    Bytes& operator=(const Bytes&) = delete;
    const void* data() const { return view_.buf; }
    size_t nbytes() const { return static_cast<size_t>(view_.len); }

  private:
    Py_buffer view_;
};

// Rows of `width` 64-bit integers in any contiguous buffer, such as array('q').
template <size_t width>
class Table {
  public:
    using Row = std::array<uint64_t, width>;
    Table(const py::object& object, const char* what) : bytes_(object) {
        if (bytes_.nbytes() % sizeof(Row) != 0) {
            throw std::invalid_argument(std::string(what) + ": not rows of " + std::to_string(width) +
                                        " 64-bit integers");
        }
    }
    size_t size() const { return bytes_.nbytes() / sizeof(Row); }
    Row operator[](size_t i) const {
        Row row;
        std::memcpy(row.data(), static_cast<const char*>(bytes_.data()) + i * sizeof(Row), sizeof(Row));
        return row;
    }

  private:
    Bytes bytes_;
};

// The address of a row that has none: its owner is then the source itself, a `bytes` object.
uint64_t address_of_owner(const py::list& owners, size_t i, uint64_t nbytes) {
    if (nbytes == 0 || i >= owners.size()) return 0;
    PyObject* owner = PyList_GET_ITEM(owners.ptr(), static_cast<Py_ssize_t>(i));
    if (!PyBytes_Check(owner) || static_cast<uint64_t>(PyBytes_GET_SIZE(owner)) != nbytes) return 0;
    return reinterpret_cast<uint64_t>(PyBytes_AS_STRING(owner));
}

constexpr uint64_t kBorrowed = 2;  // native.image.Lifetime.UNTIL_WRITTEN

std::shared_ptr<Image> make_image(uint64_t nbytes, const py::object& extents, const py::list& owners,
                                  const py::object& records, const py::object& patches,
                                  const py::object& serials, const std::map<int, int64_t>& streams) {
    const Table<5> extent_rows(extents, "extents");
    std::vector<Extent> all_extents;
    all_extents.reserve(extent_rows.size());
    bool any_borrowed = false;
    for (size_t i = 0; i < extent_rows.size(); ++i) any_borrowed |= extent_rows[i][3] == kBorrowed;
    for (size_t i = 0; i < extent_rows.size(); ++i) {
        auto row = extent_rows[i];
        const bool is_bytes = row[1] == 0;  // immutable, so it may be borrowed too
        if (is_bytes) row[1] = address_of_owner(owners, i, row[2]);
        all_extents.push_back({row[0], row[1], row[2], row[3] != 0, static_cast<int32_t>(row[4]),
                               row[3] == kBorrowed || (any_borrowed && is_bytes)});
    }
    const Table<2> record_rows(records, "records"), patch_rows(patches, "patches");
    const Table<3> serial_rows(serials, "serials");
    std::vector<Record> all_records;
    all_records.reserve(record_rows.size());
    for (size_t i = 0; i < record_rows.size(); ++i) {
        all_records.push_back({record_rows[i][0], record_rows[i][1]});
    }
    std::vector<CrcPatch> all_patches;
    all_patches.reserve(patch_rows.size() + serial_rows.size());
    for (size_t i = 0; i < patch_rows.size(); ++i) {
        all_patches.push_back({CrcPatch::kCrc, patch_rows[i][1], patch_rows[i][0], 1});
    }
    for (size_t i = 0; i < serial_rows.size(); ++i) {
        all_patches.push_back({CrcPatch::kSerial, serial_rows[i][0], serial_rows[i][1], serial_rows[i][2]});
    }
    return std::make_shared<Image>(nbytes, std::move(all_extents), std::move(all_records),
                                   std::move(all_patches), streams);
}

std::unique_ptr<PyTransfer> save(PyMover& self, const std::string& path, const std::shared_ptr<Image>& image,
                                 bool overlap, const std::string& check) {
    const Check chosen_check = check_named(check);
    auto mover = self.mover.get();
    std::shared_ptr<Transfer> transfer;
    {
        py::gil_scoped_release released;
        transfer = mover->begin(path, image, overlap, chosen_check);
    }
    // From here on the destructor of the handle stops the transfer if a signal handler raises.
    auto handle = std::unique_ptr<PyTransfer>(new PyTransfer{Owned(transfer), Owned(mover)});
    transfer.reset();
    mover.reset();
    wait_for(std::nullopt, [&](auto until) { return handle->transfer.raw()->advance(until); });
    return handle;
}

Digest wait_written(const PyTransfer& self, std::optional<double> timeout) {
    auto transfer = self.transfer.get();
    if (!wait_for(timeout, [&](auto until) { return transfer->wait_written(until); })) {
        PyErr_Format(PyExc_TimeoutError, "%s: not durable yet", transfer->path().c_str());
        throw py::error_already_set();
    }
    return transfer->digest();
}

py::dict stats(const PyTransfer& self) {
    auto transfer = self.transfer.get();
    TransferStats stats = transfer->stats();
    py::dict result;
    result["nbytes"] = stats.nbytes;
    result["eager_bytes"] = stats.eager_bytes;
    result["lazy_bytes"] = stats.lazy_bytes;
    result["borrowed_bytes"] = stats.borrowed_bytes;
    result["zero_copy_bytes"] = stats.zero_copy_bytes;
    result["save_s"] = stats.save_s;
    result["copy_s"] = stats.copy_s;
    result["write_s"] = stats.write_s;
    result["direct"] = stats.direct;
    return result;
}

void raise_file_error(const FileError& error) {
    py::object path = py::reinterpret_steal<py::object>(
        PyUnicode_DecodeFSDefaultAndSize(error.path.data(), static_cast<Py_ssize_t>(error.path.size())));
    if (!path) return;
    PyErr_SetObject(PyExc_OSError, py::make_tuple(error.code, error.what(), path).ptr());
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "The C++ half of roll_ckpt. Import it through roll_ckpt.native.extension.";
    m.attr("cuda_compiled") = cuda::table().compiled;

    static py::handle damaged = py::exception<DamagedFile>(m, "DamagedFile", PyExc_ValueError).release();
    static py::handle source_changed =
        py::exception<SourceChanged>(m, "SourceChanged", PyExc_RuntimeError).release();
    py::register_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const FileError& error) {
            raise_file_error(error);
        } catch (const DamagedFile& error) {
            // The text holds a path, which need not be UTF-8.
            py::object text = py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(error.what()));
            if (text) PyErr_SetObject(damaged.ptr(), text.ptr());
        } catch (const SourceChanged& error) {
            py::object text = py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(error.what()));
            if (text) {
                PyErr_SetObject(source_changed.ptr(), py::make_tuple(text, error.start, error.end).ptr());
            }
        } catch (const Cancelled&) {
            if (!PyErr_Occurred()) PyErr_SetNone(PyExc_KeyboardInterrupt);
        }
    });

    m.def("use_twin_of_cuda", &cuda::use_twin, py::arg("copy_s"));
    m.def("cuda_status", [] {
        py::gil_scoped_release released;
        return cuda::table().status();
    });
    m.def(
        "crc32",
        [](const py::object& buffer, uint32_t start, bool portable) {
            Bytes bytes(buffer);
            py::gil_scoped_release released;
            return (portable ? crc32_portable : crc32)(bytes.data(), bytes.nbytes(), start);
        },
        py::arg("buffer"), py::arg("start") = 0, py::arg("portable") = false);
    m.def(
        "address_of",
        [](const py::object& buffer) {
            Bytes bytes(buffer);
            return py::make_tuple(reinterpret_cast<uintptr_t>(bytes.data()), bytes.nbytes());
        },
        py::arg("buffer"));

    py::class_<Digest>(m, "Digest")
        .def_readonly("nbytes", &Digest::nbytes)
        .def_readonly("block_bytes", &Digest::block_bytes)
        .def_readonly("crcs", &Digest::crcs);

    py::class_<Buffer>(m, "Buffer", py::buffer_protocol())
        .def_buffer([](Buffer& buffer) {
            return py::buffer_info(buffer.mapping.data(), 1, "B", 1, {buffer.nbytes}, {uint64_t{1}});
        })
        .def("__len__", [](const Buffer& buffer) { return buffer.nbytes; })
        .def_property_readonly("address", [](const Buffer& buffer) {
            return reinterpret_cast<uintptr_t>(buffer.mapping.data());
        });

    py::class_<PyArena>(m, "Arena")
        .def(py::init([](uint64_t capacity_bytes, uint64_t block_bytes) {
                 return std::unique_ptr<PyArena>(
                     new PyArena{Owned(std::make_shared<Arena>(capacity_bytes, block_bytes))});
             }),
             py::arg("capacity_bytes"), py::arg("block_bytes"))
        .def_property_readonly("block_bytes", [](const PyArena& a) { return a.arena.get()->block_bytes(); })
        .def_property_readonly("capacity_bytes",
                               [](const PyArena& a) { return a.arena.get()->capacity_bytes(); })
        .def_property_readonly("used_bytes", [](const PyArena& a) { return a.arena.get()->used_bytes(); })
        .def_property_readonly("peak_bytes", [](const PyArena& a) { return a.arena.get()->peak_bytes(); })
        .def_property_readonly("pinned", [](const PyArena& a) { return a.arena.get()->pinned(); })
        .def_property_readonly("pinned_reason",
                               [](const PyArena& a) { return a.arena.get()->pinned_reason(); })
        .def(
            "warm",
            [](const PyArena& a, uint64_t nbytes, int device) {
                auto arena = a.arena.get();
                py::gil_scoped_release released;
                arena->warm(nbytes, device);
            },
            py::arg("nbytes"), py::arg("device") = -1)
        .def("wait_warm", [](const PyArena& a) {
            auto arena = a.arena.get();
            py::gil_scoped_release released;
            arena->wait_warm();
        });

    py::class_<Image, std::shared_ptr<Image>>(m, "Image")
        .def(py::init(&make_image), py::arg("nbytes"), py::arg("extents"), py::arg("owners"),
             py::arg("records"), py::arg("patches"), py::arg("serials"), py::arg("streams"))
        .def_property_readonly("nbytes", &Image::nbytes)
        .def_property_readonly("eager_bytes", &Image::eager_bytes)
        .def_property_readonly("lazy_bytes", &Image::lazy_bytes);

    py::class_<PyTransfer>(m, "Transfer")
        .def_property_readonly("overlapped",
                               [](const PyTransfer& t) { return t.transfer.get()->overlapped(); })
        .def_property_readonly("copied", [](const PyTransfer& t) { return t.transfer.get()->copied(); })
        .def_property_readonly("released", [](const PyTransfer& t) { return t.transfer.get()->released(); })
        .def_property_readonly("written", [](const PyTransfer& t) { return t.transfer.get()->written(); })
        .def_property_readonly("stats", &stats)
        .def(
            "wait_copied",
            [](const PyTransfer& t, std::optional<double> timeout, bool help) {
                auto transfer = t.transfer.get();
                return wait_for(timeout, [&](auto until) { return transfer->wait_copied(until, help); });
            },
            py::arg("timeout") = py::none(), py::arg("help") = true)
        .def(
            "wait_released",
            [](const PyTransfer& t, std::optional<double> timeout) {
                auto transfer = t.transfer.get();
                return wait_for(timeout, [&](auto until) { return transfer->wait_released(until); });
            },
            py::arg("timeout") = py::none())
        .def("wait_written", &wait_written, py::arg("timeout") = py::none())
        .def("abandon", [](const PyTransfer& t) {
            auto transfer = t.transfer.get();
            py::gil_scoped_release released;
            transfer->abandon();
        });

    py::class_<PyMover>(m, "Mover")
        .def(py::init([](const PyArena& arena, int copy_threads, int io_threads, bool direct) {
                 if (copy_threads < 0 || io_threads < 1)
                     throw py::value_error(
                         "a Mover needs io_threads of at least 1 and copy_threads of at least 0");
                 return std::unique_ptr<PyMover>(new PyMover{
                     Owned(std::make_shared<Mover>(arena.arena.get(), copy_threads, io_threads, direct))});
             }),
             py::arg("arena"), py::arg("copy_threads"), py::arg("io_threads"), py::arg("direct"))
        .def("save", &save, py::arg("path"), py::arg("image"), py::arg("overlap"), py::arg("check"))
        .def(
            "shutdown",
            [](const PyMover& m, double timeout_s) {
                auto mover = m.mover.get();
                auto deadline = deadline_after(timeout_s);
                py::gil_scoped_release released;
                return mover->shutdown(deadline);
            },
            py::arg("timeout_s"));

    m.def(
        "read_file",
        [](const std::string& path, uint64_t nbytes, uint64_t block_bytes,
           const std::optional<std::vector<uint32_t>>& crcs, int threads, bool direct) {
            py::gil_scoped_release released;
            return read_file(path, nbytes, block_bytes, crcs, threads, direct, signalled);
        },
        py::arg("path"), py::arg("nbytes"), py::arg("block_bytes"), py::arg("crcs"), py::arg("threads"),
        py::arg("direct"));
    m.def(
        "digest_file",
        [](const std::string& path, uint64_t block_bytes, int threads, bool direct) {
            py::gil_scoped_release released;
            return digest_file(path, block_bytes, threads, direct, signalled);
        },
        py::arg("path"), py::arg("block_bytes"), py::arg("threads"), py::arg("direct"));
}
