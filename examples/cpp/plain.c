/* The exported function and its Jacobian, without libtorch: prints both, then what a call takes. */
#include <stdio.h>
#include <time.h>

#include "arm.h"

int main(int count, char **arguments) {
  double q[ARM_Q_SIZE], jacobian[ARM_JACOBIAN_SIZE], value[ARM_VALUE_SIZE];
  for (int i = 0; i < ARM_Q_SIZE; i++) {
    if (count != ARM_Q_SIZE + 1 || sscanf(arguments[i + 1], "%lf", &q[i]) != 1) {
      fprintf(stderr, "plain takes %d angles\n", ARM_Q_SIZE);
      return 2;
    }
  }
  if (!arm(q, jacobian, value, NULL)) return 1;
  for (int i = 0; i < ARM_VALUE_SIZE; i++) printf("%a\n", value[i]);
  for (int i = 0; i < ARM_JACOBIAN_SIZE; i++) printf("%a\n", jacobian[i]);

  struct timespec begin, end;
  const int turns = 200000;
  double sum = 0;
  clock_gettime(CLOCK_MONOTONIC, &begin);
  for (int k = 0; k < turns; k++) {
    q[0] += 1e-9;
    arm(q, jacobian, value, NULL);
    sum += jacobian[0];
  }
  clock_gettime(CLOCK_MONOTONIC, &end);
  const double seconds = (double)(end.tv_sec - begin.tv_sec) + 1e-9 * (double)(end.tv_nsec - begin.tv_nsec);
  fprintf(stderr, "plain C: %.2f us a call (value and Jacobian; %g)\n", 1e6 * seconds / turns, sum);
  return 0;
}
