// Two ways on libtorch: the exported function with tensors, and Jacobians of graphs that libtorch
// recorded, for code that cannot be exported.
#include <torch/torch.h>
#include <torchjac/jacobian.h>

#include <cstdio>

#include "arm.hpp"
#include "timing.h"

// The row loop as it stands everywhere: what the header is compared with.
static at::Tensor row_loop(const at::Tensor &output, const at::Tensor &input) {
  std::vector<at::Tensor> rows;
  const at::Tensor flat = output.reshape(-1);
  for (int64_t r = 0; r < flat.numel(); r++)
    rows.push_back(torch::autograd::grad({flat[r]}, {input}, {}, true)[0]);
  return at::stack(rows);
}

int main() {
  // The question that torchjac began with.
  const auto options = torch::dtype(torch::kDouble).requires_grad(true);
  const torch::Tensor q = torch::tensor({1.0, 2.0}, options);
  const at::Tensor J = torchjac::jacobian(torch::cat({2 * q, 4 * q * q}), q);
  bool right = torch::equal(
      J, torch::tensor({{2., 0.}, {0., 2.}, {8., 0.}, {0., 16.}}, torch::kDouble));

  // A graph: rows in chunks, against rows one by one.
  torch::manual_seed(0);
  const torch::Tensor x = torch::randn({40}, options);
  const torch::Tensor w = torch::randn({300, 40}, torch::kDouble);
  const torch::Tensor y = torch::tanh(w.mv(x)) * x.sum();
  right &= torch::allclose(torchjac::jacobian(y, x), row_loop(y, x), 1e-12, 1e-12);
  const auto blocks = torchjac::jacobian({y, q * 2}, std::vector<at::Tensor>{x, q});
  right &= torch::equal(blocks[1][1], 2 * torch::eye(2, torch::kDouble));
  right &= !blocks[0][1].any().item<bool>();
  std::printf("300 x 40 graph: %.0f us, row by row %.0f us\n",
              microseconds([&] { torchjac::jacobian(y, x); }, 20),
              microseconds([&] { row_loop(y, x); }, 20));

  // The exported arm: tensors in, tensors out; another shape is an error.
  const torch::Tensor angles = torch::linspace(-1, 1, ARM_Q_SIZE, torch::kDouble);
  const auto [jacobian, value] = arm_tensors::call(angles);
  std::printf("exported arm: %.2f us\n", microseconds([&] { arm_tensors::call(angles); }, 100000));
  right &= jacobian.sizes() == at::IntArrayRef({ARM_VALUE_SIZE, ARM_Q_SIZE});
  bool refused = false;
  try {
    arm_tensors::call(angles.slice(0, 1));
  } catch (const c10::Error &) {
    refused = true;
  }
  std::printf(right && refused ? "right\n" : "WRONG\n");
  return right && refused ? 0 : 1;
}
