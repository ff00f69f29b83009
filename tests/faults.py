"""Faults that tests/test_kernels_mutants.py seeds into the kernels, one a line: name | text | replacement.

A text occurs once in its module, or the name ends in #n: the n-th occurrence. When the source changes, change
this table. Left out are int64 offsets, which only maps of 2^31 elements tell from int32, and what another
line repeats: one of two masks of the same element, or a masked load whose value a later mask drops.
"""

TABLE = """
reference
  half-missing | 0.5 * (squares | (squares
  eps-missing | F.softplus(raw_scale) + eps | F.softplus(raw_scale)
  log-missing |  + rows * variance.log() | 
  log-once-instead-of-per-row | rows * variance.log() | variance.log()
  sum-over-channels | / mean.numel() | / rows
  bias-ignored | F.conv2d(hidden, weight, bias) | F.conv2d(hidden, weight)
  energy-not-squared | x.square().mean(dim=1) | x.abs().mean(dim=1)
  normalised-over-images | flatten(1), dim=1) | flatten(1), dim=0)
  t-instead-of-t-squared | temperature**2 *  | temperature * 
  divergence-of-the-other-direction | (teacher.exp() * ( | (student.exp() * (
  mean-over-classes | / student_logits.shape[0] | / student_logits.numel()
checks
  squares-in-fp16 | return [t.float() if | return [t if
vid
  strides-of-the-scale-ignored | inverse_count = dense(raw_scale), | inverse_count = raw_scale,
  nan-swallowed | tl.minimum(x, 20.0, propagate_nan=tl.PropagateNan.ALL) | tl.where(x < 20.0, x, 20.0)
  softplus-held-at-20 | tl.where(x > 20.0, x,  | tl.where(x > 20.0, 20.0, 
  softplus-zero-at-minus-17 | tl.where(w == 1.0, u,  | tl.where(w == 1.0, 0.0, 
  log-instead-of-log1p | tl.log(w) * (u / (w - 1.0)) | tl.log(w)
  eps-missing | _softplus(raw) + eps | _softplus(raw)
  half-of-the-squared-error-missing | 0.5, tl.float32 | 1.0, tl.float32
  row-mask-dropped | (offs_m < rows - first) | (offs_m >= 0)
  row-mask-of-the-first-program | offs_m < rows - first | offs_m < rows
  channel-mask-dropped | first)[:, None] & mask_c[None, | first)[:, None] & (offs_c >= 0)[None,
  gradient-sign | residual * slope[None, :] | -residual * slope[None, :]
  programs-overlap | to(tl.int64) * tiles * BLOCK_ROWS | to(tl.int64) * BLOCK_ROWS
  gradient-of-the-first-program | gradient_ptr += first * CHANNELS | gradient_ptr += 0
  times-the-variance | inverse_count / variance_of( | inverse_count * variance_of(
  upstream-ignored | slope *= tl.load(upstream_ptr) | slope *= 1.0
  squares-in-fp16 | += residual * residual | += (residual * residual).to(mean_ptr.dtype.element_ty)
  last-tile-only | squares += residual * residual | squares = residual * residual
  partial-sums-overlap | partial_ptr + tl.program_id(0) * CHANNELS + offs_c | partial_ptr + offs_c
  program-mask-dropped | (offs_m < rows) | (offs_m >= 0)
  first-programs-only | range(0, rows, BLOCK_ROWS) | range(0, BLOCK_ROWS, BLOCK_ROWS)
  first-channel-block-only | offs_c = tl.program_id(1) * BLOCK_CHANNELS +  | offs_c = 
  half-missing | 0.5 * tl.sum(terms) | tl.sum(terms)
  log-missing | quotient + share * tl.log(variance) | quotient
  factor-not-on-the-log | share = factor / CHANNELS | share = 1.0 / CHANNELS
  log-summed-over-channels | share = factor / CHANNELS | share = factor
  sigmoid-missing | tl.sigmoid(raw) *  | 
  half-of-the-scale-gradient-missing | 0.5 * tl.sigmoid(raw) | tl.sigmoid(raw)
  scale-gradient-sign | (share - quotient) | (quotient - share)
  last-rows-left-out | triton.cdiv(max(rows, 1), block_rows) | max(1, rows // block_rows)
  mean-over-positions | factor / target.numel() if | factor / target[:, 0].numel() if
  empty-batch-is-zero | float("nan") | 0.0
  gradients-swapped | _vid_nll(target, mean, *rest, True | _vid_nll(mean, target, *rest, True
  factor-of-the-reference-missing | factor * reference.vid_nll( | reference.vid_nll(
  bias-gradient-variance-missing | residuals * inverse_count / variance | residuals * inverse_count
  bias-gradient-in-place-of-the-scale | WEIGHTS + CHANNELS + offs_c | WEIGHTS + offs_c
  scale-gradient-in-place-of-weight | parameters_ptr + WEIGHTS + offs_c, | parameters_ptr + offs_c,
  first-weights-left-out | (block - CHANNEL_BLOCKS) * | block *
  weight-mask-dropped | offs_w < WEIGHTS | offs_w >= 0
  weight-partials-stride-is-channels | offs_w, mask_w, WEIGHTS, | offs_w, mask_w, CHANNELS,
  loss-of-the-first-block-only | shares.sum() if blocks > 1 | shares[0] if blocks > 1
projected_vid
  strides-of-parameters-ignored-in-backward | hidden, dense(weight),  | hidden, weight, 
  bias-ignored | mean + bias[None, :] - target | mean - target
  padded-rows-not-masked | tl.where(mask_m[:, None] & mask_c | tl.where((offs_m >= 0)[:, None] & mask_c
  row-mask-of-the-first-program | offs_m < rows - first | offs_m < rows
  column-mask-dropped | (offs_columns < COLUMNS) | (offs_columns >= 0)
  hidden-stride-is-channels | hidden_ptr += first * HIDDEN | hidden_ptr += first * CHANNELS
  target-stride-is-hidden | target_ptr += first * CHANNELS | target_ptr += first * HIDDEN
  weight-stride-is-channels | offs_c, mask_c, offs_k, HIDDEN) | offs_c, mask_c, offs_k, CHANNELS)
  upstream-ignored | slope *= tl.load(upstream_ptr) | slope *= 1.0
  own-slice-twice | (own + step) % | (own + step + 1) %
  other-slices-left-out | tl.static_range(1, SLICES) | tl.static_range(1, 1)
  first-slice-only | offs_k = own * SLICE +  | offs_k = 
  squares-of-the-last-tile | squares += tl.sum( | squares = tl.sum(
  weight-gradient-of-the-last-tile | (gradient), hidden, weight_gradient) | (gradient), hidden)
  hidden-gradient-of-one-program | hidden_gradient_ptr + first * HIDDEN + offs | hidden_gradient_ptr + offs
  gradient-row-mask-dropped | mask = mask_m[:, None] & (offs_k | mask = (offs_m >= 0)[:, None] & (offs_k
  gradient-column-mask-dropped | mask_m[:, None] & (offs_k < HIDDEN) | mask_m[:, None] & (offs_k >= 0)
  weight-partials-overlap | weight_partial_ptr += program * | weight_partial_ptr += 0 *
  weight-partials-mask-dropped | mask = mask_c[:, None] & (offs_k | mask = (offs_c >= 0)[:, None] & (offs_k
  gradient-counts-hidden-elements | per_element(target, factor) | per_element(hidden, factor)
  gradients-swapped | rest[channels:].to(bias | rest[:channels].to(bias
  two-pass-weight-of-one-program | weight_partial.sum(0) | weight_partial[0]
  target-gradient-lost |  and not target.requires_grad | 
  bias-of-the-convolution-ignored | None if bias is None else bias.to(hidden.dtype)) | None)
attention
  position-mask-dropped | (offs_p < positions - first) | (offs_p >= 0)
  channel-mask-dropped | (offs_c < CHANNELS) | (offs_c >= 0)
  first-channels-only | offs_c = channel +  | offs_c = 
  sum-over-channels | return sums / CHANNELS | return sums
  sum-over-channels-in-registers | axis=1) / STUDENT_CHANNELS | axis=1)
  eps-missing | tl.where(norm < 1e-12, 1e-12, norm) | norm
  norm-of-the-last-tile | student_squares += student | student_squares = student
  products-of-the-last-tile | products += difference | products = difference
  gradient-of-the-first-channels | in range(0, STUDENT_CHANNELS, | in range(0, STUDENT_BLOCK,
  mean-over-images-only | factor / (images * positions) | factor / images
  factor-missing | factor / (images * positions) | 1.0 / (images * positions)
  gradients-swapped | _transfer(teacher, student, factor, True | _transfer(student, teacher, factor, True
  first-positions-only | map_ptr += tl.cast(first, tl.int64) * CHANNELS | map_ptr += 0
  teacher-stride-is-the-student-s#1 | positions * TEACHER_CHANNELS | positions * STUDENT_CHANNELS
  teacher-stride-is-the-student-s#2 | positions * TEACHER_CHANNELS | positions * STUDENT_CHANNELS
  gradient-of-one-image#1 | gradient_ptr += image * positions * STUDENT_CHANNELS | gradient_ptr += 0
  gradient-of-one-image#2 | gradient_ptr += image * positions * STUDENT_CHANNELS | gradient_ptr += 0
  half-the-gradient#1 | 4.0 / STUDENT_CHANNELS | 2.0 / STUDENT_CHANNELS
  half-the-gradient#2 | 4.0 / STUDENT_CHANNELS | 2.0 / STUDENT_CHANNELS
  upstream-ignored#1 | slope *= tl.load(upstream_ptr) | slope *= 1.0
  upstream-ignored#2 | slope *= tl.load(upstream_ptr) | slope *= 1.0
  shares-overlap#1 | loss_ptr + image | loss_ptr
  shares-overlap#2 | loss_ptr + image | loss_ptr
  along-dropped#1 |  - student * along) / student_norm | ) / student_norm
  along-dropped#2 |  - student * along) / student_norm | ) / student_norm
  along-kept-at-the-least-norm#1 | along * 0.0 | along
  along-kept-at-the-least-norm#2 | along * 0.0 | along
  wrong-sign#1 | student - teacher / teacher_norm | student + teacher / teacher_norm
  wrong-sign#2 | student - teacher / teacher_norm | student + teacher / teacher_norm
  wrong-sign#3 | student - teacher / teacher_norm | student + teacher / teacher_norm
  teacher-not-normalised#1 | student - teacher / teacher_norm | student - teacher
  teacher-not-normalised#2 | student - teacher / teacher_norm | student - teacher
  teacher-not-normalised#3 | student - teacher / teacher_norm | student - teacher
kd
  t-squared-missing | temperature * temperature * inverse_images | inverse_images
  t-instead-of-t-squared | temperature * temperature * inverse_images | temperature * inverse_images
  t-of-the-gradient-missing | slope = temperature * inverse_images | slope = inverse_images
  not-softened | axis=1)[:, None], temperature) | axis=1)[:, None], 1.0)
  largest-not-subtracted | logits - tl.max(logits, axis=1)[:, None] | logits
  largest-of-the-padding-too | tl.where(mask, logits.to(tl.float32), float("-inf")) | logits.to(tl.float32)
  wrong-sign | probability * (teacher - student) | probability * (student - teacher)
  nan-of-padding | tl.where(mask, probability * (teacher - student), 0.0) | probability * (teacher - student)
  row-mask-dropped | mask = (offs_b < images) | mask = (offs_b >= 0)
  class-mask-dropped | images)[:, None] & (offs_k < CLASSES) | images)[:, None] & (offs_k >= 0)
  padding-counted | columns = (offs_k < CLASSES) | columns = (offs_k >= 0)
  teacher-stride-is-the-student-s | offs_b[:, None] * teacher_stride | offs_b[:, None] * student_stride
  gradient-stride-is-the-student-s | offs_b[:, None] * CLASSES | offs_b[:, None] * student_stride
  shares-overlap | loss_ptr + tl.program_id(0) | loss_ptr
  upstream-ignored | slope *= tl.load(upstream_ptr) | slope *= 1.0
  divergence-missing-in-the-teacher-s-gradient | terms - probability * tl.sum(terms, axis=1)[:, None] | terms
  factor-missing | temperature, factor / images) | temperature, 1.0 / images)
  student-gradient-sign | tl.exp(student) - probability | probability - tl.exp(student)
  student-gets-the-teacher-s-gradient | *numbers, False, True, upstream | *numbers, True, True, upstream
  teacher-gets-the-student-s-gradient | *numbers, True, True, upstream | *numbers, False, True, upstream
one_pass
  one-pass-in-fp16 |  and gradient_of.dtype != torch.float16 | 
  small-upstream-ignored | if upstream != 1.0 | if upstream > 1.0
  large-upstream-ignored | if upstream != 1.0 | if upstream < 1.0
  rescaled-twice | values * upstream | values * upstream * upstream
  rescaled-by-each-program | tl.cdiv(elements, BLOCK), tl.num_programs(0) | tl.cdiv(elements, BLOCK), 1
  parameters-not-rescaled | mask=mask) * upstream | mask=mask)
  parameter-mask-dropped | mask = offs_p < parameters | mask = offs_p >= 0
  tail-left-out | 1 if size % 16 else 16 | 16
  buffer-used-by-both-backward-passes | gradient, ctx.gradient = ctx.gradient, None | gradient = ctx.gradient
  two-pass-parameters-not-scaled | None, parameters * upstream | None, parameters
"""


def _parse() -> list[tuple[str, str, int, str, str]]:
    faults, module = [], ""
    for line in TABLE.strip().splitlines():
        if not line.startswith(" "):
            module = line
            continue
        name, text, replacement = (part.removeprefix(" ").removesuffix(" ") for part in line[1:].split("|"))
        name, _, occurrence = name.partition("#")
        faults.append((module, name + occurrence, int(occurrence or 0), text, replacement))
    return faults


FAULTS = _parse()
"""(module, name, which occurrence or 0 if there is only one, text, replacement)"""
