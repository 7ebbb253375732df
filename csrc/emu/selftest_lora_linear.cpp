// One ragged launch of every schedule of lora_linear and of its gradients in bf16, without Python or torch, which do
// not run under sanitizers. Prints the schedules; fails where a result is not near that of plain loops.
#include <cmath>
#include <cstdio>
#include <exception>
#include <random>
#include <string>

#include "lora_linear_launches.h"

namespace lk {
namespace {

std::mt19937 random_bits(0);

struct Matrix {
  int64_t rows, columns;
  std::vector<uint16_t> bits;

  Matrix(int64_t rows, int64_t columns) : rows(rows), columns(columns), bits(rows * columns) {}

  static Matrix random(int64_t rows, int64_t columns) {
    Matrix m(rows, columns);
    std::normal_distribution<float> normal;
    for (uint16_t& b : m.bits) b = static_cast<uint16_t>(BFloat16::pack(normal(random_bits), 0.0f));
    return m;
  }

  double at(int64_t row, int64_t column) const { return BFloat16::low(bits[row * columns + column]); }
  MatrixRef ref() const { return {bits.data(), columns, rows, columns, FloatType::kBFloat16}; }
};

// What the vendor's product would be: value(row, column), rounded.
template <class Value>
void fill(Matrix& m, const Value& value) {
  for (int64_t i = 0; i < m.rows * m.columns; ++i) {
    m.bits[i] = static_cast<uint16_t>(BFloat16::pack(static_cast<float>(value(i / m.columns, i % m.columns)), 0.0f));
  }
}

// `exact(row, column)` within 2 % of the largest.
template <class Exact>
void check(const Matrix& result, const char* name, const Exact& exact) {
  double error = 0.0, largest = 0.0;
  for (int64_t row = 0; row < result.rows; ++row) {
    for (int64_t column = 0; column < result.columns; ++column) {
      const double wanted = exact(row, column), difference = std::fabs(result.at(row, column) - wanted);
      error = difference <= error ? error : difference;  // a NaN is the largest error
      largest = std::max(largest, std::fabs(wanted));
    }
  }
  if (!(error <= 0.02 * largest)) throw std::logic_error(std::string(name) + " is off by " + std::to_string(error));
}

template <class F>
double sum(int64_t count, const F& f) {
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) total += f(i);
  return total;
}

void run(int64_t m, int64_t n, int64_t k, int64_t rank, int sms, double dropout_p, Wanted wanted) {
  constexpr float kScaling = 0.5f;
  const DeviceLimits device{.sms = sms, .shared_per_block = 99 << 10, .capability = 86};
  const int64_t seed = 7;
  const Matrix x = Matrix::random(m, k), w = Matrix::random(n, k), a = Matrix::random(rank, k),
               b = Matrix::random(n, rank), grad_y = Matrix::random(m, n);
  const LoraProblem problem{.x = x.ref(),
                            .w = w.ref(),
                            .a = a.ref(),
                            .b = b.ref(),
                            .scaling = kScaling,
                            .seed = dropout_p > 0 ? &seed : nullptr,
                            .dropout_p = dropout_p};
  Matrix y(m, n), s(m, rank);
  const auto of_vendor = [](const UsesCublas& cublas, double value) {
    return cublas.yes ? 0.0 : value;  // the vendor's product is not here to be added
  };
  UsesCublas forward_cublas;
  {
    const LoraForwardConfig config = lora_forward_config(problem, device, wanted);
    if (config.vendor_makes_s) {
      fill(s, [&](int64_t i, int64_t r) { return sum(k, [&](int64_t c) { return x.at(i, c) * a.at(r, c); }); });
    }
    std::vector<uint32_t> counters(config.launch.counters);
    std::vector<float> partials(config.launch.partials);
    const LoraWorkspace workspace{.counters = counters.data(), .partials = partials.data()};
    for (const LoraLinearConfig* launch : {&config.launch, &config.expand}) {
      if (launch->blocks == 0) continue;
      const LoraLinearParams p = forward_params(problem, {y.bits.data(), n}, s.bits.data(), *launch, workspace);
      launch_lora_linear<BFloat16>(p, *launch, nullptr);
      std::printf("%s\n", name_of(launch->key.schedule));
    }
    forward_cublas = config.cublas;
  }
  check(y, "y", [&](int64_t i, int64_t j) {
    return of_vendor(forward_cublas, sum(k, [&](int64_t c) { return x.at(i, c) * w.at(j, c); })) +
           kScaling * sum(rank, [&](int64_t r) { return s.at(i, r) * b.at(j, r); });
  });

  const LoraBackwardProblem backward{.forward = problem, .grad_y = grad_y.ref(), .s = s.ref()};
  const LoraBackwardConfig config = lora_backward_config(backward, device, wanted);
  Matrix grad_x(m, k), grad_a(rank, k), grad_b(n, rank), grad_s(m, rank);
  std::vector<uint32_t> counters(config.grad_x.counters + config.grads.counters);
  std::vector<float> partial_grad_b(config.partial_grad_b), partials(config.grads.partials);
  const LoraBackwardWorkspace workspace{.counters = counters.data(),
                                        .grad_s = grad_s.bits.data(),
                                        .partial_grad_b = partial_grad_b.data(),
                                        .partials = partials.data()};
  if (config.vendor_makes_s) {
    fill(grad_s, [&](int64_t i, int64_t r) { return sum(n, [&](int64_t j) { return grad_y.at(i, j) * b.at(j, r); }); });
  }
  for (const LoraLinearConfig* launch : {&config.grad_x, &config.expand}) {
    if (launch->blocks == 0) continue;
    launch_lora_grad_x<BFloat16>(grad_x_params(backward, {grad_x.bits.data(), k}, *launch, config, workspace), *launch,
                                 nullptr);
  }
  launch_lora_grads<BFloat16>(grads_params(backward, grad_a.bits.data(), grad_b.bits.data(), config, workspace),
                              config.grads, nullptr);
  check(grad_b, "dB", [&](int64_t j, int64_t r) {
    return kScaling * sum(m, [&](int64_t i) { return grad_y.at(i, j) * s.at(i, r); });
  });
  if (dropout_p > 0) return;
  check(grad_x, "dX", [&](int64_t i, int64_t c) {
    return of_vendor(config.cublas, sum(n, [&](int64_t j) { return grad_y.at(i, j) * w.at(j, c); })) +
           kScaling * sum(rank, [&](int64_t r) { return grad_s.at(i, r) * a.at(r, c); });
  });
  check(grad_a, "dA", [&](int64_t r, int64_t c) {
    return kScaling * sum(m, [&](int64_t i) { return grad_s.at(i, r) * x.at(i, c); });
  });
}

}  // namespace
}  // namespace lk

int main() {
  constexpr int kProblems[][5] = {{70, 72, 136, 16, 9}, {200, 72, 136, 16, 1}, {200, 72, 136, 24, 1},
                                  {70, 64, 136, 24, 1}, {5, 72, 520, 16, 40},  {33, 37, 40, 4, 1},
                                  {33, 37, 41, 17, 1}};
  try {
    for (const auto& [m, n, k, rank, sms] : kProblems) {
      for (const double dropout_p : {0.0, 0.3}) {
        for (const lk::Wanted wanted : {lk::Wanted::kOneLaunch, lk::Wanted::kCublas}) {
          lk::run(m, n, k, rank, sms, dropout_p, wanted);
        }
      }
    }
  } catch (const std::exception& e) {
    std::printf("FAILED  %s\n", e.what());
    return 1;
  }
}
