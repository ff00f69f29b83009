"""Faults that tests/test_kernels_mutants.py seeds into the kernels: {module: {name of the fault: (text, replacement)}}.

A text occurs in its module exactly once; when the source moves on, this table follows.

Left out are int64 offsets, which only maps of 2^31 elements tell from int32, and what another line repeats: one of two masks of the
same element, the value of a masked load that a later mask drops, a cast that PyTorch or Triton would do anyway.
"""

FAULTS = {
    "reference": {
        "half-missing": ("0.5 * (squares", "(squares"),
        "eps-missing": ("F.softplus(raw_scale) + eps", "F.softplus(raw_scale)"),
        "log-missing": (" + rows * variance.log()", ""),
        "log-once-instead-of-per-row": ("rows * variance.log()", "variance.log()"),
        "sum-over-channels": ("/ mean.numel()", "/ rows"),
        "bias-ignored": ("F.conv2d(hidden, weight, bias)", "F.conv2d(hidden, weight)"),
        "energy-not-squared": ("x.square().mean(dim=1)", "x.abs().mean(dim=1)"),
        "normalised-over-images": ("flatten(1), dim=1)", "flatten(1), dim=0)"),
        "t-instead-of-t-squared": ("temperature**2 * ", "temperature * "),
        "divergence-of-the-other-direction": ("(teacher.exp() * (", "(student.exp() * ("),
        "mean-over-classes": ("/ student_logits.shape[0]", "/ student_logits.numel()"),
    },
    "checks": {"squares-in-fp16": ("return [t.float() if", "return [t if")},
    "vid": {
        "strides-of-the-scale-ignored": ("raw_scale = dense(raw_scale)", "pass"),
        "strides-of-the-scale-ignored-in-backward": (
            "target, dense(raw_scale), upstream",
            "target, raw_scale, upstream",
        ),
        "nan-swallowed": (
            "tl.minimum(x, 20.0, propagate_nan=tl.PropagateNan.ALL)",
            "tl.where(x < 20.0, x, 20.0)",
        ),
        "softplus-held-at-20": ("tl.where(x > 20.0, x, ", "tl.where(x > 20.0, 20.0, "),
        "softplus-zero-at-minus-17": ("tl.where(w == 1.0, u, ", "tl.where(w == 1.0, 0.0, "),
        "log-instead-of-log1p": ("tl.log(w) * (u / (w - 1.0))", "tl.log(w)"),
        "eps-missing": ("_softplus(raw) + eps", "_softplus(raw)"),
        "half-of-the-squared-error-missing": ("0.5, tl.float32", "1.0, tl.float32"),
        "row-mask-dropped": ("(offs_m < rows - first)", "(offs_m >= 0)"),
        "row-mask-of-the-first-program": ("offs_m < rows - first", "offs_m < rows"),
        "channel-mask-dropped": (
            "rows - first)[:, None] & mask_c[None, :]",
            "rows - first)[:, None] & (offs_c >= 0)[None, :]",
        ),
        "gradient-sign": ("residual * slope[None, :]", "-residual * slope[None, :]"),
        "programs-overlap": ("to(tl.int64) * tiles * BLOCK_ROWS", "to(tl.int64) * BLOCK_ROWS"),
        "gradient-of-the-first-program": ("gradient_ptr += first * CHANNELS", "gradient_ptr += 0"),
        "times-the-variance": ("inverse_count / variance_of(", "inverse_count * variance_of("),
        "upstream-ignored": ("slope *= tl.load(upstream_ptr)", "slope *= 1.0"),
        "squares-in-fp16": (
            "squares += residual * residual",
            "squares += (residual * residual).to(mean_ptr.dtype.element_ty)",
        ),
        "last-tile-only": ("squares += residual * residual", "squares = residual * residual"),
        "partial-sums-overlap": (
            "partial_ptr + tl.program_id(0) * CHANNELS + offs_c",
            "partial_ptr + offs_c",
        ),
        "program-mask-dropped": ("(offs_p < programs)", "(offs_p >= 0)"),
        "first-programs-only": (
            "range(0, programs, BLOCK_PROGRAMS)",
            "range(0, BLOCK_PROGRAMS, BLOCK_PROGRAMS)",
        ),
        "first-channel-block-only": ("offs_c = tl.program_id(1) * BLOCK_CHANNELS + ", "offs_c = "),
        "half-missing": ("0.5 * tl.sum(tl.where(", "tl.sum(tl.where("),
        "log-missing": ("quotient + share * tl.log(variance)", "quotient"),
        "factor-not-on-the-log": ("share = factor / CHANNELS", "share = 1.0 / CHANNELS"),
        "log-summed-over-channels": ("share = factor / CHANNELS", "share = factor"),
        "sigmoid-missing": ("tl.sigmoid(raw) * ", ""),
        "half-of-the-scale-gradient-missing": ("0.5 * tl.sigmoid(raw)", "tl.sigmoid(raw)"),
        "scale-gradient-sign": ("(share - quotient)", "(quotient - share)"),
        "last-rows-left-out": (
            "tiles = cdiv(max(rows, 1), block_rows)",
            "tiles = max(1, rows // block_rows)",
        ),
        "mean-over-positions": ("factor / target.numel() if", "factor / target[:, 0].numel() if"),
        "empty-batch-is-zero": ('float("nan")', "0.0"),
        "gradients-swapped": ("(upstream, target, mean, raw_scale", "(upstream, mean, target, raw_scale"),
        "factor-of-the-reference-missing": ("factor * reference.vid_nll(", "reference.vid_nll("),
    },
    "projected_vid": {
        "strides-of-parameters-ignored-in-backward": ("hidden, dense(weight), ", "hidden, weight, "),
        "bias-ignored": ("mean + bias[None, :] - target", "mean - target"),
        "padded-rows-not-masked": (
            "tl.where(mask_m[:, None] & mask_c",
            "tl.where((offs_m >= 0)[:, None] & mask_c",
        ),
        "row-mask-of-the-first-program": ("offs_m < rows - first", "offs_m < rows"),
        "column-mask-dropped": ("(offs_columns < COLUMNS)", "(offs_columns >= 0)"),
        "hidden-stride-is-channels": ("hidden_ptr += first * HIDDEN", "hidden_ptr += first * CHANNELS"),
        "target-stride-is-hidden": ("target_ptr += first * CHANNELS", "target_ptr += first * HIDDEN"),
        "weight-stride-is-channels": (
            "(weight_ptr, offs_c, mask_c, offs_k, HIDDEN)",
            "(weight_ptr, offs_c, mask_c, offs_k, CHANNELS)",
        ),
        "upstream-ignored": ("slope *= tl.load(upstream_ptr)", "slope *= 1.0"),
        "own-slice-twice": ("(own + step) %", "(own + step + 1) %"),
        "other-slices-left-out": ("tl.static_range(1, SLICES)", "tl.static_range(1, 1)"),
        "first-slice-only": ("offs_k = own * SLICE + ", "offs_k = "),
        "squares-of-the-last-tile": ("squares += tl.sum(", "squares = tl.sum("),
        "weight-gradient-of-the-last-tile": (
            "tl.dot(tl.trans(gradient), hidden, weight_gradient)",
            "tl.dot(tl.trans(gradient), hidden)",
        ),
        "hidden-gradient-of-the-first-program": (
            "hidden_gradient_ptr + first * HIDDEN + offs",
            "hidden_gradient_ptr + offs",
        ),
        "hidden-gradient-row-mask-dropped": (
            "mask=mask_m[:, None] & (offs_k",
            "mask=(offs_m >= 0)[:, None] & (offs_k",
        ),
        "hidden-gradient-column-mask-dropped": (
            "mask=mask_m[:, None] & (offs_k < HIDDEN)",
            "mask=mask_m[:, None] & (offs_k >= 0)",
        ),
        "weight-partials-overlap": (
            "weight_partial_ptr + program * CHANNELS * HIDDEN + offs",
            "weight_partial_ptr + offs",
        ),
        "weight-partials-mask-dropped": (
            "mask=mask_c[:, None] & (offs_k",
            "mask=(offs_c >= 0)[:, None] & (offs_k",
        ),
        "weight-partials-stride-is-channels": (
            "offs_w, mask_w, CHANNELS * HIDDEN,",
            "offs_w, mask_w, CHANNELS,",
        ),
        "bias-gradient-variance-missing": (
            "residuals * inverse_count / variance",
            "residuals * inverse_count",
        ),
        "bias-gradient-in-place-of-the-scale-s": (
            "scale_gradient_ptr + CHANNELS + offs_c",
            "scale_gradient_ptr + offs_c",
        ),
        "first-weights-left-out": ("(block - 1) * BLOCK", "block * BLOCK"),
        "weight-mask-dropped": ("offs_w < CHANNELS * HIDDEN", "offs_w >= 0"),
        "gradient-counts-hidden-elements": (
            "eps, inverse_count(target, factor), CHANNELS",
            "eps, inverse_count(hidden, factor), CHANNELS",
        ),
        "loss-counts-hidden-elements": (
            "eps, factor, inverse_count(target, factor)",
            "eps, factor, inverse_count(hidden, factor)",
        ),
        "gradients-swapped": ("parameters[-channels:]", "parameters[-2 * channels:-channels]"),
        "two-pass-weight-of-one-program": ("weight_partial.sum(0)", "weight_partial[0]"),
        "target-gradient-lost": ("and not target.requires_grad", ""),
        "bias-of-the-convolution-ignored": ("None if bias is None else bias.to(hidden.dtype))", "None)"),
    },
    "attention": {
        "position-mask-dropped": ("(offs_p < positions)", "(offs_p >= 0)"),
        "channel-mask-dropped": ("(offs_c < CHANNELS)", "(offs_c >= 0)"),
        "first-channels-only": ("offs_c = first + ", "offs_c = "),
        "sum-over-channels": ("return sums / CHANNELS", "return sums"),
        "sum-over-channels-in-registers": ("axis=1) / STUDENT_CHANNELS", "axis=1)"),
        "eps-missing": ("tl.where(norm < 1e-12, 1e-12, norm)", "norm"),
        "teacher-stride-is-the-student-s": ("positions * TEACHER_CHANNELS", "positions * STUDENT_CHANNELS"),
        "gradient-of-one-image": (
            "gradient_ptr += image * positions * STUDENT_CHANNELS",
            "gradient_ptr += 0",
        ),
        "half-the-gradient": ("4.0 / STUDENT_CHANNELS", "2.0 / STUDENT_CHANNELS"),
        "upstream-ignored": ("slope *= tl.load(upstream_ptr)", "slope *= 1.0"),
        "teacher-not-normalised": ("student - teacher / teacher_norm", "student - teacher"),
        "wrong-sign": ("student - teacher / teacher_norm", "student + teacher / teacher_norm"),
        "along-dropped": (
            " - student * along) / student_norm)\n            tl.",
            ") / student_norm)\n            tl.",
        ),
        "along-dropped-in-tiles": (
            " - student * along) / student_norm)\n                for",
            ") / student_norm)\n                for",
        ),
        "along-kept-at-the-least-norm": (
            "along * 0.0)\n            coefficient",
            "along)\n            coefficient",
        ),
        "along-kept-at-the-least-norm-in-tiles": ("along * 0.0)\n            for", "along)\n            for"),
        "norm-of-the-last-tile": ("student_squares += student", "student_squares = student"),
        "products-of-the-last-tile": ("products += difference", "products = difference"),
        "gradient-of-the-first-channels": (
            "range(0, STUDENT_CHANNELS, STUDENT_BLOCK)",
            "range(0, STUDENT_BLOCK, STUDENT_BLOCK)",
        ),
        "shares-overlap": ("loss_ptr + image", "loss_ptr"),
        "mean-over-images-only": ("factor / (images * positions)", "factor / images"),
        "factor-missing": ("factor / (images * positions)", "1.0 / (images * positions)"),
        "gradients-swapped": ("(upstream, teacher, student, factor)", "(upstream, student, teacher, factor)"),
    },
    "kd": {
        "t-squared-missing": ("temperature * temperature * inverse_images", "inverse_images"),
        "t-instead-of-t-squared": (
            "temperature * temperature * inverse_images",
            "temperature * inverse_images",
        ),
        "t-of-the-gradient-missing": ("slope = temperature * inverse_images", "slope = inverse_images"),
        "not-softened": (
            "tl.div_rn(logits - tl.max(logits, axis=1)[:, None], temperature)",
            "logits - tl.max(logits, axis=1)[:, None]",
        ),
        "largest-not-subtracted": ("logits - tl.max(logits, axis=1)[:, None]", "logits"),
        "largest-of-the-padding-too": (
            'tl.where(mask, logits.to(tl.float32), float("-inf"))',
            "logits.to(tl.float32)",
        ),
        "wrong-sign": ("probability * (teacher - student)", "probability * (student - teacher)"),
        "nan-of-the-padding": (
            "tl.where(mask, probability * (teacher - student), 0.0)",
            "probability * (teacher - student)",
        ),
        "row-mask-dropped": ("mask = (offs_b < images)", "mask = (offs_b >= 0)"),
        "class-mask-dropped": (
            "(offs_b < images)[:, None] & (offs_k < CLASSES)",
            "(offs_b < images)[:, None] & (offs_k >= 0)",
        ),
        "padding-counted": ("columns = (offs_k < CLASSES)", "columns = (offs_k >= 0)"),
        "teacher-stride-is-the-student-s": (
            "offs_b[:, None] * teacher_stride",
            "offs_b[:, None] * student_stride",
        ),
        "gradient-stride-is-the-student-s": ("offs_b[:, None] * CLASSES", "offs_b[:, None] * student_stride"),
        "shares-overlap": ("loss_ptr + tl.program_id(0)", "loss_ptr"),
        "upstream-ignored": ("slope *= tl.load(upstream_ptr)", "slope *= 1.0"),
        "divergence-missing-in-the-teacher-s-gradient": (
            "terms - probability * tl.sum(terms, axis=1)[:, None]",
            "terms",
        ),
        "factor-missing": ("factor / images,", "1.0 / images,"),
        "student-gradient-sign": ("tl.exp(student) - probability", "probability - tl.exp(student)"),
        "student-gets-the-teacher-s-gradient": ("temperature, factor, False)", "temperature, factor, True)"),
        "teacher-gets-the-student-s-gradient": ("temperature, factor, True)", "temperature, factor, False)"),
    },
    "launch": {
        "one-pass-in-fp16": (" and gradient_of.dtype != torch.float16", ""),
        "small-upstream-ignored": ("if upstream != 1.0", "if upstream > 1.0"),
        "large-upstream-ignored": ("if upstream != 1.0", "if upstream < 1.0"),
        "rescaled-twice": ("values * upstream", "values * upstream * upstream"),
        "rescaled-by-each-program": (
            "tl.cdiv(elements, BLOCK), tl.num_programs(0)",
            "tl.cdiv(elements, BLOCK), 1",
        ),
        "parameters-not-rescaled": ("mask=offs < parameters) * upstream", "mask=offs < parameters)"),
        "parameter-mask-dropped": ("upstream, mask=offs < parameters)", "upstream, mask=offs >= 0)"),
        "tail-left-out": ("1 if gradient.numel() % 16 else 16", "16"),
        "buffer-used-by-both-backward-passes": (
            "gradient, ctx.gradient = ctx.gradient, None",
            "gradient = ctx.gradient",
        ),
        "two-pass-parameters-not-scaled": ("return None, parameters * upstream", "return None, parameters"),
    },
}
