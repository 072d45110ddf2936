// Stands in for CUDA's own header where the .cu files are compiled for the CPU.
#pragma once
#include "emulation.h"
