// A device in host memory. Every operator runs on the CPU, on tensors over the same memory; what a real device would
// refuse (tensors of two devices) is refused, and what it would make the host wait for is told to simulated::waited.

#include <set>
#include <string>
#include <utility>
#include <vector>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/copy.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceType.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

namespace {

const c10::Device kHost(c10::kCPU), kSimulated(c10::kPrivateUse1, 0);

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes);
    return {data, data, &c10::free_cpu, kSimulated};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(c10::kPrivateUse1, &memory);
// The autograd engine asks for streams and events: there is one stream, which is never behind.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::kPrivateUse1> {
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, kSimulated); }
  c10::Device exchangeDevice(c10::Device) const override { return kSimulated; }
  c10::Device getDevice() const override { return kSimulated; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// The host's sequence of numbers, under the name of this device.
struct Numbers final : at::CPUGeneratorImpl {
  Numbers() { belong_to(kSimulated); }
  void belong_to(c10::Device device) {
    device_ = device;
    key_set_ = c10::DispatchKeySet(device == kHost ? c10::DispatchKey::CPU : c10::DispatchKey::PrivateUse1);
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Numbers>(); }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};

void waited(const std::string& operation) {
  static auto tell = c10::Dispatcher::singleton()
                         .findSchemaOrThrow("simulated::waited", "")
                         .typed<void(c10::string_view)>();
  tell.call(operation);
}

// The same memory, as the other device sees it; it lives as long as this does.
c10::DataPtr same_memory(const c10::Storage& storage, c10::Device device) {
  auto owner = new c10::Storage(storage);
  return {storage.mutable_data(), owner, [](void* p) { delete static_cast<c10::Storage*>(p); }, device};
}

c10::Storage storage_over(const c10::Storage& storage, c10::Device device) {
  auto allocator = device == kHost ? c10::GetCPUAllocator() : &memory;
  return c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), storage.nbytes(), same_memory(storage, device), allocator, true);
}

at::Tensor tensor_over(const c10::Storage& storage, const at::Tensor& like, c10::DispatchKey key) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
  auto impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  impl->_set_conj(like.is_conj());
  impl->_set_neg(like.is_neg());
  return tensor;
}

// The arguments of one call on both devices. Tensors that share memory share it on the other side, too.
struct Call {
  const std::string name;
  std::vector<std::pair<c10::Storage, c10::Storage>> storages;  // simulated, host
  std::vector<std::pair<at::Tensor, at::Tensor>> written;  // simulated, host
  std::vector<at::Generator> generators;
  bool simulated = false, host = false;

  ~Call() {
    for (auto& generator : generators) generator.get<Numbers>()->belong_to(kSimulated);
  }

  c10::Storage to_host(const c10::Storage& storage) {
    for (auto& [ours, theirs] : storages)
      if (ours.is_alias_of(storage)) return theirs;
    storages.emplace_back(storage, storage_over(storage, kHost));
    return storages.back().second;
  }

  c10::Storage to_simulated(const c10::Storage& storage) {
    for (auto& [ours, theirs] : storages)
      if (theirs.is_alias_of(storage)) return ours;
    storages.emplace_back(storage_over(storage, kSimulated), storage);
    return storages.back().first;
  }

  at::Tensor to_host(const at::Tensor& tensor, bool write) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_privateuseone()) {
      host = host || write || tensor.dim() > 0;  // a number of the host goes along with every kernel
      return tensor;
    }
    simulated = true;
    auto theirs = tensor_over(to_host(tensor.storage()), tensor, c10::DispatchKey::CPU);
    if (write) written.emplace_back(tensor, theirs);
    return theirs;
  }

  at::Tensor to_simulated(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    for (auto& [ours, theirs] : written)
      if (theirs.is_same(tensor)) return ours;
    return tensor_over(to_simulated(tensor.storage()), tensor, c10::DispatchKey::PrivateUse1);
  }

  c10::IValue to_host(const c10::IValue& value, bool write) {
    if (value.isTensor()) return to_host(value.toTensor(), write);
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& one : value.toTensorVector()) list.push_back(to_host(one, write));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (std::optional<at::Tensor> one : value.toOptionalTensorList())
        list.push_back(one ? std::optional(to_host(*one, write)) : one);
      return list;
    }
    if (value.isGenerator() && value.toGenerator().device() == kSimulated) {
      generators.push_back(value.toGenerator());
      generators.back().get<Numbers>()->belong_to(kHost);
    }
    if (value.isStorage() && value.toStorage().device() == kSimulated) return to_host(value.toStorage());
    if (value.isDevice() && value.toDevice().is_privateuseone()) return kHost;
    return value;
  }

  c10::IValue to_simulated(const c10::IValue& value) {
    if (value.isTensor()) return to_simulated(value.toTensor());
    if (!value.isTensorList()) return value;
    c10::List<at::Tensor> list;
    for (const at::Tensor& one : value.toTensorVector()) list.push_back(to_simulated(one));
    return list;
  }

  // What was written to may have been resized, or lie in other memory now.
  void follow() {
    for (auto& [ours, theirs] : written) {
      auto impl = ours.unsafeGetTensorImpl();
      impl->set_storage_keep_dtype(to_simulated(theirs.storage()));
      impl->set_sizes_and_strides(theirs.sizes(), theirs.strides(), theirs.storage_offset());
    }
    for (auto& [ours, theirs] : storages) {
      if (ours.data() != theirs.data()) ours.set_data_ptr_noswap(same_memory(theirs, kSimulated));
      ours.set_nbytes(theirs.nbytes());
    }
  }
};

// Operators whose kernels on a device wait: the sizes of their answers depend on values, or they look for errors.
const std::set<std::string> kWaiting = {
    "aten::_local_scalar_dense", "aten::equal",  "aten::is_nonzero",  "aten::nonzero",  "aten::argwhere",
    "aten::masked_select", "aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::bincount", "aten::histc", "aten::multinomial", "aten::repeat_interleave", "aten::_linalg_eigh",
    "aten::linalg_eig", "aten::_linalg_svd", "aten::linalg_lstsq", "aten::_linalg_check_errors",
};

bool masks(const c10::IValue& indices) {
  if (!indices.isOptionalTensorList()) return false;
  for (std::optional<at::Tensor> one : indices.toOptionalTensorList())
    if (one && one->defined() && (one->scalar_type() == at::kBool || one->scalar_type() == at::kByte)) return true;
  return false;
}

bool waits(const std::string& name, c10::ArrayRef<c10::IValue> arguments) {
  if (name == "aten::repeat_interleave") return arguments.back().isNone();  // no output_size
  if (kWaiting.count(name)) return true;
  if (name == "aten::index") return masks(arguments[1]);
  if (name != "aten::index_put_" && name != "aten::_index_put_impl_") return false;
  bool fills = arguments[2].toTensor().numel() == 1 && !arguments[3].toBool();  // becomes masked_fill
  return masks(arguments[1]) && !fills;
}

void run_on_host(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto count = schema.arguments().size();
  Call call{schema.name()};
  std::vector<c10::IValue> arguments(stack->end() - count, stack->end());
  if (waits(call.name, arguments)) waited(call.name);
  torch::jit::Stack inner;
  for (size_t k = 0; k < count; ++k) {
    auto alias = schema.arguments()[k].alias_info();
    inner.push_back(call.to_host(arguments[k], alias != nullptr && alias->isWrite()));
  }
  TORCH_CHECK(!(call.simulated && call.host), "Expected all tensors to be on the same device, but found at least two ",
              "devices, ", kSimulated, " and cpu! (", call.name, ")");
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &inner);
  call.follow();
  torch::jit::drop(*stack, count);
  for (auto& value : inner) stack->push_back(call.to_simulated(value));
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

// Every copy to the host waits, and so does a copy from it that is not told otherwise (non_blocking).
at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (from.device() != to.device()) {
    if (to.is_cpu()) waited("copy to the host");
    else if (!non_blocking) waited("copy from the host");
  }
  Call call{"copy"};
  auto source = call.to_host(from, false), target = call.to_host(to, false);
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  target.copy_(source);
  return to;
}

}  // namespace

TORCH_LIBRARY(simulated, m) {
  m.def("waited(str operation) -> ()");
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  c10::register_privateuse1_backend("simulated");
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  for (auto composed : {"convolution", "convolution_backward"})  // these ask for kernels by the kind of device
    m.impl(composed, torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

// Copies resolve these bits, as they do on the CPU; resolving them by a copy would never end.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
