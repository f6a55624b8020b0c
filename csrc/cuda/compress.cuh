// dgc::compress_ on a GPU: seven kernels, launched in the order of this list. docs/kernels.md has the idea,
// which is the CPU's: the update leaves the largest |v| of every 32 elements, the k-th largest of these bounds the
// threshold from below, and only groups that reach the bound are read again.
//
//   update   what is kept, v; group maxima; first digit of the bound             20.1 B/element, 28.1 with Adam
//   bound    second digit of the bound                                           reads the maxima
//   collect  candidates: elements that reach the bound; first digit of theirs    reads the maxima and 1 group in 30
//   digit    second digit of the threshold                                       reads candidates
//   last     last digit of the threshold                                         reads candidates
//   place    counts what is sent, tile by tile, and sums up                      reads candidates
//   emit     writes the payload, takes it off v, masks momentum                  reads candidates
//
// A kernel has one block for each tile (update: for each chunk). What a whole segment has to know, the last of its
// blocks to finish works out, so that nothing waits and nothing is launched for it. All sizes depend on the layout
// alone, all numbers that change are in device memory: the sequence can be captured in a CUDA graph.
#pragma once

#include "pack.cuh"
#include "select.cuh"
#include "update.cuh"
