// The question that torchjac began with, x = [2 q, 4 q^2], exported twice: as plain C, and as a
// package that AOTInductor compiled, which libtorch loads at run time.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdio>

#include "question.h"
#include "timing.h"

int main(int count, char **arguments) {
  if (count != 2) {
    std::fprintf(stderr, "packaged takes the path of question.pt2\n");
    return 2;
  }
  const c10::InferenceMode no_graph;
  const torch::Tensor q = torch::tensor({1.0, 2.0}, torch::kDouble);
  const auto expected = torch::tensor({{2., 0.}, {0., 2.}, {8., 0.}, {0., 16.}}, torch::kDouble);

  double jacobian[QUESTION_JACOBIAN_SIZE], value[QUESTION_VALUE_SIZE];
  bool right = question(q.const_data_ptr<double>(), jacobian, value, nullptr);
  right &= torch::equal(torch::from_blob(jacobian, {4, 2}, torch::kDouble), expected);
  double at[] = {1.0, 2.0}, sum = 0;
  const double plain = microseconds(
      [&] {
        at[0] += 1e-9;
        question(at, jacobian, value, nullptr);
        sum += jacobian[4];
      },
      1000000);

  torch::inductor::AOTIModelPackageLoader package(arguments[1]);
  const auto found = package.run({q});  // what the function gives, then the Jacobian
  right &= torch::equal(found.at(1), expected);
  right &= torch::equal(found.at(0), torch::tensor({2., 4., 4., 16.}, torch::kDouble));
  const double loaded = microseconds([&] { package.run({q}); }, 20000);
  std::printf("question: plain C %.3f us, package %.2f us (%g)\n", plain, loaded, sum);
  std::printf(right ? "right\n" : "WRONG\n");
  return right ? 0 : 1;
}
