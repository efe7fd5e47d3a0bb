"""`python -m tests.mutants`: breaks one term of the C++ kernels at a time and shows that the tests notice.

Each mutant is compiled in place of the kernels, the tests of single steps and of the vectors run, and the kernels are
compiled again as they were.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = [
    *("tests/test_vectors.py", "tests/test_step.py", "tests/test_finite.py"),
    *("tests/test_philox.py", "tests/test_samples.py", "tests/test_accumulate.py", "tests/test_intake.py"),
    *("tests/test_device.py", "tests/test_capturable.py", "tests/test_formats.py", "tests/test_masters.py"),
    *("tests/test_rounding.py", "tests/test_altered_states.py", "tests/test_format_checkpoints.py"),
    *("tests/test_norm.py", "tests/test_snapshot.py", "tests/test_look.py", "tests/test_memory.py"),
]

#: file, what stands there, what takes its place
MUTANTS = [
    ("rules.h", "return bg / (bg + bhg);", "return bhg / (bg + bhg);"),
    ("rules.h", "bhg * w * s.inv_a", "bg * w * s.inv_a"),
    ("rules.h", "fma(dg, dg, sigma2)", "fma(dghat, dg, sigma2)"),
    ("rules.h", "fma(dghat, dghat, sigma2)", "dghat * dghat"),
    ("rules.h", "fma(w * w, given.variance, qg)", "fma(w, given.variance, qg)"),
    ("rules.h", "fma((A(1) - w) * (A(1) - w), given", "fma(w * w, given"),
    ("rules.h", "fma(b, s.inv_a, d * dghat)", "fma(b, s.inv_a, d * dg)"),
    ("rules.h", "at_least(b * w * s.inv_a", "at_least(b * s.inv_a"),
    ("rules.h", "(t == 1.0 ? 0.0 : 2.0)", "(t == 1.0 ? 0.0 : 1.0)"),
    ("rules.h", "s.gain2 * (phi * phi)", "s.gain2 * (ghat * ghat)"),
    ("rules.h", "A(1.0 - h[beta1] * h[decay])", "A(1.0 - h[beta1])"),
    ("numbers.h", "A(int32_t(word >> 8)) < kept", "A(int32_t(word >> 9)) < kept"),
    ("vec512.h", "_mm512_max_ps(_mm512_set1_ps(floor), x.part[i])", "x.part[i]"),
    ("block512.h", "given.word = inputs_.words + i;", "given.word = inputs_.words;"),
    ("philox.h", "key1 += 0xbb67ae85u;", "key1 += 0xbb67ae84u;"),
    ("philox.h", "uint32_t(quad) + i", "uint32_t(quad)"),
    ("tile.h", "four.at(at.element(j))", "four.at(j)"),
    ("draw_vectors.h", "+ first + i * Vector::count)", "+ i * Vector::count)"),
    ("draw_avx512.cpp", "_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7)", "_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7)"),
    ("draw_avx2.cpp", "_mm256_setr_epi64x(0, 2, 1, 3)", "_mm256_setr_epi64x(0, 1, 2, 3)"),
    ("philox.h", "return i & 2 ? high : low;", "return low;"),
    ("step_rule.h", "tile.block = i / kCodes;", ""),
    ("run_cpu.h", "variance[i] * sign * sign", "variance[i] * sign"),
    ("rules.h", "fma(s.rho2, qghat, s.prior2)", "fma(s.rho1, qghat, s.prior2)"),
    ("rules.h", "const double rho1 = 1.0 - double(s.kept1)", "const double rho1 = pow(t, -h[tau1])"),
    ("numbers.h", "return fmaf(x, y, z);", "return x * y + z;"),
    ("rules.h", "s.v_scale) + s.eps), theta * s.decay)", "s.v_scale) + s.eps), theta)"),
    ("rules.h", "(t == 1.0 ? 0.0 : 1.0)", "1.0"),
    ("rules.h", "(square_root(v * s.v_scale) + s.eps), theta", "square_root(v * s.v_scale), theta"),
    ("rules.h", "bhg = at_least(fma(", "bhg = (fma("),
    ("numbers.h", "ghat + poison", "ghat"),
    ("numbers.h", "ghat = -Bounds<A>::big > ghat ? -Bounds<A>::big : ghat;", ""),
    ("numbers.h", "bits = magnitude < 0x0400u ? subnormal : bits;", ""),
    ("formats.h", "(rounded + 0x8000) & -0x10000", "(rounded + 0x7fff) & -0x10000"),
    ("formats.h", "code + int32_t((random >> 16) >> extra)", "code + (0x8000 >> extra)"),
    ("formats.h", "(raised < overflow ? raised : overflow - 1)", "raised"),
    ("formats.h", "code = code < 0 ? 0 : code;", ""),
    ("formats.h", "return small ? int32_t(fixed) : int32_t(normal);", "return int32_t(normal);"),
    ("formats.h", "fixed += fixed < 0x1p23f ? 0.5f : 0.0f;", ""),
    ("operands.h", "masters[i], 8, random_of(start, first + i)) >> 8", "masters[i], 8, 0u) >> 8"),
    ("operands.h", "low[i] * 256", "low[i] * 128"),
    ("tile.h", "is_16_bit<P> && row.extra < 16", "is_16_bit<P> && row.extra < 8"),
    ("chunks.h", "(numel_[i] + kBlock - 1) / kBlock", "numel_[i] / kBlock"),
    ("chunks.h", "int64_t move = wraps ? 1 - layout_.sizes[d] : 1;", "int64_t move = 1;"),
    ("chunks.h", "from[walk.offset[operand]]", "from[walk.offset[0]]"),
    ("norm.cpp", "for (int j = 0; i + j < n; ++j)", "for (int j = 0; i + j < n - 1; ++j)"),
    ("samples.h", "share.kept * fma(", "fma("),
    ("samples.h", "A(1.0 - double(own))", "A(double(n - 1) / double(n))"),
    ("samples.h", "mean = fma(share.own, d, mean);", "mean = mean + share.own * d;"),
    ("samples_cpu.cpp", "number == 2", "number == 3"),
    ("samples_device.h", "if (count > 1) variance", "if (count > 0) variance"),
    ("samples_device.h", "if (count + row.added > 1)", "if (count > 1)"),
    ("samples_cpu.cpp", "reinterpret_cast<const P*>(address) + k * row.stride", "reinterpret_cast<const P*>(address)"),
    (
        "samples_cpu.cpp",
        "add(gathered, mean, variance, end - begin, count + k + 1)",
        "add(gathered, mean, variance, end - begin, k + 1)",
    ),
    ("samples_device.h", "if (count > 0) mean", "if (count > 1) mean"),
    ("samples_device.h", "kSampleOperand, k * row.stride)", "kSampleOperand)"),
    ("samples_device.h", "if (count + k == 0) {", "if (k == 0) {"),
    ("samples_device.h", "first += step.warps * kTile", "first += 2 * step.warps * kTile"),
    ("tensor_records.h", " | (shape.strides_data()[d] ^ strides[d])", ""),
    ("tensor_records.h", "(shape.sizes_data()[d] ^ sizes[d]) | ", ""),
    ("tensor_records.h", "keys_of(t) != layout[0] || ", ""),
    ("tensor_records.h", " || kind_of(t) != layout[1]", ""),
    ("snapshot.cpp", "address & (alignment - 1) : -1", "0 : -1"),
    ("tensor_records.h", "now.get_context() == context && ", ""),
    ("tensor_records.h", "t.*Member::offset == offset", "true"),
    ("snapshot.cpp", "param != before.param || !THPVariable_CheckExact(param)", "param != before.param"),
    ("snapshot.cpp", "if (version_of(each.dict) != each.version) return false;", ""),
    ("snapshot.cpp", "outermost[i++].ptr() != each.dict", "(i++, false)"),
    ("snapshot.cpp", "if (now.words != entries_.words) return false;", ""),
    ("snapshot.cpp", "words.push_back(word(key)), ", ""),
    (
        "snapshot.cpp",
        "held_.push_back(held_of(tensor));",
        "held_.push_back(held_of(tensor)), kept.append(py::handle(tensor));",
    ),
    ("snapshot.cpp", "return gradients_ != before_;", "return false;"),
    ("look.cpp", "found.push_back(PyObject_Size(container));", ""),
    ("look.cpp", "add(key);", ""),
    ("watch.h", "return true;", "return false;"),
    ("noise.h", "x = (x ^ (x >> 15) ^ b) * 0x846ca68bu;", "x = (x ^ (x >> 15)) * 0x846ca68bu;"),
    ("noise.h", "start ^ uint32_t(i) * kSpread", "start + uint32_t(i) * kSpread"),
    ("noise.h", "kSpread = 0x9e00ce00u", "kSpread = 0x9e00cf00u"),
    ("states.h", "(random >> (32u - k))", "(1u << (k - 1u))"),
    ("states.h", "k == kFirstRate ? other_bits(random) : random", "random"),
    ("codes512.h", "k == kFirstRate ? 16 : 0, 8>", "0, 8>"),
    ("states.h", "if (highest_code(rates.low, rates.high, k) > kLastRate) ++k;", ""),
    ("states.h", "kOne + (random >> (32u - shift))", "kOne + (1u << (shift - 1u))"),
    ("states.h", "high(larger(range.high, kTinyBits))", "high(range.high)"),
    ("states.h", " | (range.nan & kHasNan)", ""),
    ("states.h", "bit_cast<uint32_t>(x) + (random >> 16);", "bit_cast<uint32_t>(x) + 0x8000u;"),
    ("block512.h", "i > 0 && i <= kCodes - kLast", "i <= kCodes - kLast"),
    ("block512.h", "i <= kCodes - kLast * Vec::size", "i < kCodes - kLast * Vec::size"),
    ("codes512.h", "_mm512_sub_epi8(bytes, first_)", "bytes"),
    ("codes512.h", "uint32_t code = 1;", "uint32_t code = 2;"),
    ("codes512.h", "return *word < kLargeMean;", "return true;"),
    ("codes512.h", "return !q8.has_nan && ", "return "),
    ("codes512.h", "!(_mm512_cmple_epu16_mask(least, halves(rates.least)) | ", "!("),
    ("codes512.h", " | _mm512_cmpge_epu16_mask(most, halves(rates.most))", ""),
    ("codes512.h", "base >= least && ", ""),
    ("codes512.h", " && last <= (most - base) >> k", ""),
    ("codes512.h", "larger_magnitude(high_, x.part[i])", "high_"),
    ("rules.h", "rho > 1.0f - 0x1p-10f ? INFINITY : ", ""),
    ("rules.h", "floor > 0x1p-70f ? floor : 0x1p-70f", "0x1p-70f"),
    ("block512.h", "seen(ghat, kCodes, per_gradient)", "seen(ghat, 0, per_gradient)"),
    ("block512.h", "seen(variance, variances, per_variance)", "seen(variance, 0, per_variance)"),
    ("block512.h", "broadcast(0xc0000000u)", "broadcast(0x40000000u)"),
    ("block512.h", "all_below_two(kUnit, kUnit * kUnit)", "true"),
    ("block512.h", "(variance_of_samples + i) * sign * sign", "(variance_of_samples + i) * (sign * sign)"),
    ("run_avx512.cpp", "scalars.sign == 1.0f", "scalars.sign != 0.0f"),
    ("vec512.h", "_mm512_fnmadd_ps(", "_mm512_fmadd_ps("),
    ("run_avx512.cpp", "left > kCodes ? kCodes : 0", "0"),
    ("codes512.h", "_mm512_mask_sub_epi8(bytes, negative,", "_mm512_mask_sub_epi8(bytes, ~negative,"),
    ("codes512.h", "return random_at<0, 16>(i, start);", "return broadcast(0x8000u);"),
    ("codes512.h", "? 16 : 0, 8>", "? 16 : 0, 9>"),
    ("block512.h", "at.block * kCodes + ahead), words", "at.block * kCodes), words"),
    ("packed512.h", "c < 32 ? c : 2 * c - 32", "c < 33 ? c : 2 * c - 31"),
    ("packed512.h", "_mm512_rorv_epi32(first, down_to_place)", "_mm512_srlv_epi32(first, down_to_place)"),
    ("packed512.h", "random_at<16, 32 - Coding::shift>", "random_at<0, 32 - Coding::shift>"),
    ("codes512.h", "_mm512_min_epu32(low_, bits)", "low_"),
    ("packed.h", "k += fits_at[0] ? 0 : ", "k += "),
    ("packed.h", "fits_at[1] ? 1 : fits_at[2] ? 2 : 3", "fits_at[1] ? 1 : 2"),
    ("packed.h", "high[j] = smaller(rates.high, kMostRate);", "high[j] = rates.high;"),
    ("packed.h", "smaller(bit_cast<uint32_t>(state[j + 1]), kMostRate)", "bit_cast<uint32_t>(state[j + 1])"),
    ("packed.h", "base[0] + (rate_code(0, state, random) << k)", "bit_cast<uint32_t>(state[1])"),
    ("run_packed.h", "if (has_nan<states>(state)) each[i] = bit_cast<float>(kNan);", ""),
    ("tile.h", "if constexpr (packed) each_lane([&](int lane) { spread_nan(lanes[lane]); });", ""),
    ("tile.h", "if (!nan && high > kInfinity) return false;", ""),
    ("tile.h", "high = larger(high, range[k].high);", ""),
    ("tile.h", "kWhole || at.element(j) < row.numel", "true"),
    ("tile.h", "block.numbers_or_nan(code, state)", "block.numbers(code, state)"),
    ("tile.h", "block.template number_or_nan<rate>", "block.template number<rate>"),
    ("packed512.h", "c < 8 ? c / 8.0f", "c < 7 ? c / 8.0f"),
    ("packed512.h", "_mm512_movepi32_mask(x)", "__mmask16(0)"),
    ("packed512.h", "means.high > kScale ? means.high - kScale : 0", "means.high"),
    ("packed512.h", "larger(ranges[1].high, ranges[rates].high) <= kMostRate", "true"),
    ("packed512.h", "_mm512_sub_epi16(joined, bases)", "joined"),
    ("packed512.h", "words_[0] < kMostUnits &&  // nor", "// nor"),
    ("packed512.h", "unfloored.has(coding.base[0], first, coding.k) && ", ""),
    ("packed512.h", " && (rates == 1 || unfloored.has(coding.base[1], second, coding.k))", ""),
    ("packed512.h", "if (coding.k > 24) return false;", ""),
    ("packed512.h", "broadcast(Coding::mean_mask), 0xd8)", "broadcast(Coding::mean_mask), 0xf8)"),
    ("packed512.h", "if (means.high >= kMostUnits + kScale) return false;", ""),
    ("run_avx512.cpp", "  kept.code();\n}", "}"),
    ("step_device.h", "if (!(count.found_inf && *count.found_inf != 0.0f)) *counter = t;", "*counter = t;"),
    ("step_device.h", "first += step.warps * kTile", "first += 2 * step.warps * kTile"),
    (
        "lanes.h",
        "if (element(j) < numel) base[offset(operand, j)] = pack.at[j];",
        "base[offset(operand, j)] = pack.at[j];",
    ),
]


def build() -> None:
    """Compiles the kernels in place."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--force"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def tests_fail() -> bool:
    """Whether the tests notice what is compiled now."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-k", "not eager and not triton", *TESTS]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode != 0  # a crash counts


def main() -> int:
    """Runs every mutant; returns the number that survive."""
    survivors = 0
    try:
        for name, term, mutation in MUTANTS:
            path = ROOT / "csrc" / name
            original = path.read_text()
            if original.count(term) != 1:
                raise ValueError(f"{name}: expected {term!r} once, found it {original.count(term)} times")
            try:
                path.write_text(original.replace(term, mutation))
                build()
                noticed = tests_fail()
            finally:
                path.write_text(original)
            survivors += not noticed
            print(f"{'noticed ' if noticed else 'SURVIVED'}  {name}: {term}  ->  {mutation or '(nothing)'}", flush=True)
    finally:
        build()
    print(f"{len(MUTANTS) - survivors} of {len(MUTANTS)} noticed")
    return survivors


if __name__ == "__main__":
    sys.exit(main())
