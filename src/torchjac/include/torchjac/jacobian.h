/* Whole Jacobians of libtorch graphs: outputs and inputs in, blocks out.
 *
 * For code that cannot be exported: rows are evaluated by reverse passes, in chunks under one level
 * of vmap where every operation on the graph has a batching rule, else one by one.
 *
 *   torch::Tensor q = torch::tensor({1.0, 2.0}, torch::requires_grad());
 *   torch::Tensor x = torch::cat({2 * q, 4 * q * q});
 *   torch::Tensor J = torchjac::jacobian(x, q);   // 4 x 2
 */
#pragma once

#include <ATen/ATen.h>
#include <ATen/LegacyBatchedTensorImpl.h>
#include <ATen/LegacyVmapMode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace torchjac {

namespace detail {

/* Gradients of some rows of an output, with the rows in front. */
inline std::vector<at::Tensor> rows(const at::Tensor& output, const std::vector<at::Tensor>& inputs,
                                    const at::Tensor& seeds, bool batched, bool create_graph) {
  std::vector<at::Tensor> found;
  if (batched) {
    const int64_t level = at::impl::VmapMode::increment_nesting();
    std::vector<at::Tensor> made;
    try {
      made = torch::autograd::grad({output}, inputs, {at::addBatchDim(seeds, level, 0)},
                                   /*retain_graph=*/true, create_graph, /*allow_unused=*/true);
    } catch (...) {
      at::impl::VmapMode::decrement_nesting();
      throw;
    }
    at::impl::VmapMode::decrement_nesting();
    for (size_t j = 0; j < inputs.size(); j++) {
      std::vector<int64_t> shape = inputs[j].sizes().vec();
      shape.insert(shape.begin(), seeds.size(0));
      if (!made[j].defined()) {
        found.push_back(at::zeros(shape, inputs[j].options()));
      } else if (at::isBatchedTensor(made[j])) {
        const auto* inner = at::maybeGetBatchedImpl(made[j]);
        found.push_back(inner->value().movedim(inner->bdims().front().dim(), 0));
      } else {  // it does not depend on the seed
        found.push_back(made[j].expand(shape));
      }
    }
    return found;
  }
  std::vector<std::vector<at::Tensor>> parts(inputs.size());
  for (int64_t r = 0; r < seeds.size(0); r++) {
    const auto made = torch::autograd::grad({output}, inputs, {seeds[r]}, /*retain_graph=*/true,
                                            create_graph, /*allow_unused=*/true);
    for (size_t j = 0; j < inputs.size(); j++)
      parts[j].push_back(made[j].defined() ? made[j] : at::zeros_like(inputs[j]));
  }
  for (auto& part : parts) found.push_back(at::stack(part));
  return found;
}

}  // namespace detail

/* The Jacobians of every output with respect to every input.
 *
 * Args:
 *   outputs: Tensors with a graph.
 *   inputs: Tensors on that graph that require gradients.
 *   create_graph: Whether the result can be differentiated.
 *   chunk: Rows in one pass.
 * Returns: blocks[i][j] of shape outputs[i].sizes() + inputs[j].sizes(). The graph is kept.
 * Throws c10::Error where an output has no graph.
 */
inline std::vector<std::vector<at::Tensor>> jacobian(const std::vector<at::Tensor>& outputs,
                                                     const std::vector<at::Tensor>& inputs,
                                                     bool create_graph = false,
                                                     int64_t chunk = 256) {
  TORCH_CHECK(!inputs.empty() && chunk > 0, "torchjac: there are no inputs, or no rows in a chunk");
  std::vector<std::vector<at::Tensor>> blocks;
  for (const auto& output : outputs) {
    TORCH_CHECK(output.requires_grad(), "torchjac: an output has no graph");
    const int64_t m = output.numel();
    std::vector<std::vector<at::Tensor>> parts(inputs.size());
    bool batched = !create_graph;
    for (int64_t start = 0; start < m; start += chunk) {
      const int64_t count = std::min(chunk, m - start);
      at::Tensor seeds = at::zeros({count, m}, output.options().requires_grad(false));
      seeds.diagonal(start).fill_(1);
      std::vector<int64_t> shape = output.sizes().vec();
      shape.insert(shape.begin(), count);
      seeds = seeds.reshape(shape);
      std::vector<at::Tensor> made;
      if (batched && count > 1) {
        try {
          made = detail::rows(output, inputs, seeds, true, create_graph);
        } catch (const c10::Error&) {  // an operation without a batching rule
          batched = false;
        }
      }
      if (made.empty()) made = detail::rows(output, inputs, seeds, false, create_graph);
      for (size_t j = 0; j < inputs.size(); j++) parts[j].push_back(made[j]);
    }
    std::vector<at::Tensor> line;
    for (size_t j = 0; j < inputs.size(); j++) {
      std::vector<int64_t> shape = output.sizes().vec();
      shape.insert(shape.end(), inputs[j].sizes().begin(), inputs[j].sizes().end());
      line.push_back(m ? at::cat(parts[j]).reshape(shape) : at::zeros(shape, inputs[j].options()));
    }
    blocks.push_back(line);
  }
  return blocks;
}

/* The Jacobian of one output with respect to one input. */
inline at::Tensor jacobian(const at::Tensor& output, const at::Tensor& input,
                           bool create_graph = false, int64_t chunk = 256) {
  return jacobian(std::vector<at::Tensor>{output}, std::vector<at::Tensor>{input}, create_graph,
                  chunk)[0][0];
}

}  // namespace torchjac
