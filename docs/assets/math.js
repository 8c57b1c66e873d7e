// MathJax lies beside this file; only pages with formulas load it
window.MathJax = {
  tex: {
    inlineMath: [["\\(", "\\)"]],
    displayMath: [["\\[", "\\]"]],
    processEscapes: true,
    macros: { tr: "\\operatorname{tr}", E: "\\mathbb{E}" },
  },
  chtml: { matchFontHeight: false },
  options: { ignoreHtmlClass: ".*|", processHtmlClass: "arithmatex", enableMenu: false },
};
{
  const base = document.currentScript.src;
  if (document.querySelector(".arithmatex")) {
    const script = document.createElement("script");
    script.src = new URL("mathjax/tex-chtml.js", base).href;
    document.head.append(script);
  }
}
