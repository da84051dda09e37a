"""What a model, a client or a name may say to break out of a page; none of it may do anything."""

from __future__ import annotations

MARKUP = (
    "<script>window.broken = 1</script>",
    "</pre></template></script><img src=x onerror='window.broken = 1'>",
    "<svg onload=window.broken=1><style>*{display:none}</style>",
    "\"><a href='javascript:window.broken=1'>click</a>",
    "' onmouseover='window.broken=1",
    "&lt;b&gt; &#60;script&#62;window.broken=1&#60;/script&#62; &amp;",
    "<!-- <![CDATA[ ]]> --> <?php ?>",
    "<base href='https://evil.example/'><meta http-equiv=refresh content='0;url=https://evil.example/'>",
    "<form action='https://evil.example/'><button>send</button></form>",
    "{{constructor.constructor('window.broken=1')()}} ${window.broken=1}",
)
HIDDEN = "a\u202eb\u2066c\u200bd\x1b[31me\x00f\x7fg\u00adh\u2028i\ufeffj\U000e0041k\u115fl"
"""Overrides of direction, escape sequences, and characters that nobody sees."""
TEXT = "\n".join((*MARKUP, HIDDEN))
